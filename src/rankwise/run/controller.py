"""Listens to the optimizer and moves the budget of ranks: penalty before its step, scores and allocation after.

A controller acts when the optimizer that holds its adapter's parameters steps; see `rankwise.run.hooks`.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters import AdapterLayer
from rankwise.config import AdaLoraConfig
from rankwise.method.allocation import allocate
from rankwise.method.importance import ElementImportance, GateImportance
from rankwise.method.penalty import orthogonality_penalty
from rankwise.method.schedule import BudgetSchedule, Phase
from rankwise.method.scores import TripletLayout, update_scores
from rankwise.parallel.sharded import (
    gather,
    local,
    local_like,
)
from rankwise.parallel.zero import ZeroParts, partitioned, who_steps
from rankwise.run.history import RankHistory
from rankwise.run.hooks import Closure, listen, stop_listening
from rankwise.run.penalty import AddedPenalty
from rankwise.run.state import AllocationState, RunState, RunWeights
from rankwise.run.whose_step import Turns

BUFFERS = ("rankwise_sensitivity", "rankwise_uncertainty", "rankwise_mask", "rankwise_skipped")

_PREFERENCE = ("lora_E", "lora_A", "lora_B")  # the optimizer that holds the first of these counts the steps
_ORDER = ("lora_A", "lora_E", "lora_B")  # in which DeepSpeed's parts of the factors are numbered
_ABOUT_OPTIMIZERS = ("_held", "_heard", "_parts")  # attributes that are not copied or pickled


class Controller:
    """Runs AdaLoRA for one adapter of one model.

    What must survive a checkpoint is kept in buffers of the model (scores and mask, see `BUFFERS`) and in
    `packed_state`, so that the model's own ``state_dict`` carries it through any trainer.

    Args:
        model: the adapted model; the buffers are registered on it.
        layers: module path -> adapted layer, in model order.
        adapter: the adapter's name.
        config: its configuration.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, AdapterLayer], adapter: str, config: AdaLoraConfig
    ) -> None:
        self._model = weakref.ref(model)
        self.layers, self.adapter, self.config = layers, adapter, config
        factors = [layer.adapter_parameters(adapter) for layer in layers.values()]
        self.layout = TripletLayout(
            ranks=tuple(f["lora_A"].shape[0] for f in factors),
            widths_in=tuple(f["lora_A"].shape[1] for f in factors),
            widths_out=tuple(f["lora_B"].shape[0] for f in factors),
        )
        self.schedule: BudgetSchedule | None = None
        if config.total_step is not None:
            self.schedule = config.resolved_schedule()
        self.step = 0
        self.fixed = False  # the choice of ranks is final
        self.automatic = True  # steps are counted here, and not by calls of update_and_allocate
        self.history = RankHistory(list(layers))
        self.history.record(0, self.initial, list(self.layout.ranks))
        self._told: set[str] = set()
        self._idle = set(range(len(layers)))  # layers that have had no gradient in any scored step
        if config.gated and config.orth_reg_weight:
            self._tell(
                f"`orth_reg_weight`={config.orth_reg_weight} belongs to the paper's form of AdaLoRA, which PEFT "
                "has. This is the other form, which starts and learns as LoRA does, scales by lora_alpha / target_r, "
                "and learns best without the penalty: leave `orth_reg_weight` out. For PEFT's form set "
                "`init_lora_weights=True`."
            )
        self._penalty = AddedPenalty(len(layers))
        self._turns = Turns()
        self._forget_optimizers()
        self._cache: dict[Any, Any] = {}
        device = factors[0]["lora_A"].device
        self.importance = (GateImportance if config.gated else ElementImportance)(self.layout)
        entries = self.importance.entries if self.prunes else 0
        values = (
            torch.zeros(entries, device=device),
            torch.zeros(entries, device=device),
            torch.ones(self.initial, dtype=torch.bool, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )
        for name, value in zip(BUFFERS, values, strict=True):
            model.register_buffer(name, value)
        listen(self)

    def detach(self) -> None:
        """Stop listening and take the buffers off the model."""
        stop_listening(self)
        for name in BUFFERS:
            delattr(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name not in _ABOUT_OPTIMIZERS}
        return {**own, "_cache": {}, "_model": self.model, "_turns": Turns(self._turns.leader)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model = weakref.ref(state["_model"])
        self._forget_optimizers()
        listen(self)

    def _forget_optimizers(self) -> None:
        self._held: weakref.WeakKeyDictionary[torch.optim.Optimizer, Any] = weakref.WeakKeyDictionary()
        self._parts: ZeroParts | None = None  # of a model in DeepSpeed ZeRO
        self._heard = False  # an optimizer's steps are heard of, so that scores need no call by hand

    @property
    def model(self) -> nn.Module:
        """The adapted model, which holds the controller and not the other way round, so that it can be freed."""
        model = self._model()
        if model is None:
            raise RuntimeError("The adapted model does not exist any more.")
        return model

    # Budget and schedule.

    @property
    def initial(self) -> int:
        """Triplets at the start."""
        return self.layout.triplets

    @property
    def target(self) -> int:
        """Triplets in the end: ``target_r`` per layer, or all if the adapter has no more than that."""
        return min(self.config.target_r * len(self.layers), self.initial)

    @property
    def prunes(self) -> bool:
        """Whether there is anything to prune."""
        return self.target < self.initial

    def set_total_step(self, total_step: int) -> None:
        """Set the length of the run; see `AdaLoraConfig.with_total_step`."""
        config = self.config.with_total_step(total_step)
        self.schedule, self.config = config.resolved_schedule(), config

    def state(self) -> AllocationState:
        """Where the run stands. Waits for the device."""
        if self.fixed:
            phase = Phase.FINAL
        else:
            phase = self.schedule.phase(max(self.step, 1)) if self.schedule else Phase.WARMUP
        return AllocationState(
            step=self.step,
            phase=str(phase),
            budget=self._budget(),
            target=self.target,
            initial=self.initial,
            skipped_steps=int(self._buffer("skipped")),
            total_step=self.schedule.total_step if self.schedule else None,
        )

    @property
    def under_way(self) -> bool:
        """Whether the run has begun and is not over."""
        return self.step > 0 and (self.schedule is None or self.step < self.schedule.total_step)

    def tell_if_unfinished(self) -> None:
        """Warn, once a step, that a run which may end here has not brought the budget down to its target."""
        if self.fixed or not self.prunes or not self.step:
            return
        self._tell(
            f"At step {self.step} the budget is {self._budget()} triplets; its target is "
            f"{self.target}, which the schedule reaches at step "
            f"{self.schedule.last_allocation if self.schedule else '?'}. If training ends here, call "
            "`model.finalize_ranks()`, which brings it to the target, and save (again)."
        )

    def _budget(self) -> int:
        """The budget of the last allocation, in triplets of average size. Waits for the device."""
        return self.history.records[-1].budget if self.config.gated else int(self._buffer("mask").sum())

    # One optimizer step.

    def before_step(self, optimizer: torch.optim.Optimizer, closure: Closure | None = None) -> Closure | None:
        """Add the penalty's gradient to ``.grad``: now, or whenever ``closure`` has computed gradients.

        Returns:
            The closure to step with, if there is one.

        Raises:
            ValueError: the length of the run is not known, or the optimizer can't do with a penalty.
        """
        if self.schedule is None and self.automatic and self.prunes:
            raise ValueError(
                "The length of the run is not known: pass `total_step` to AdaLoraConfig, or call "
                "`model.set_total_step(n)` with the number of optimizer steps before the first one."
            )
        if self.config.orth_reg_weight and isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS compares values of the loss within a step, and the orthogonality penalty is in no loss: "
                f"set `orth_reg_weight=0` (it is {self.config.orth_reg_weight}), or use another optimizer."
            )
        if (held := self._in_parts(optimizer)) and (parts := self._zero_parts()):
            self._penalty.add_to_parts(self.config.orth_reg_weight, optimizer, parts, held)
            return closure
        if not self._turns.begin(optimizer):
            return closure
        if closure is None or not self.config.orth_reg_weight:
            self._add_penalty(optimizer)
            return closure

        def penalized() -> Any:
            loss = closure()
            self._add_penalty(optimizer)
            return loss

        return penalized

    def _add_penalty(self, optimizer: torch.optim.Optimizer) -> None:
        A, B = self._factors("lora_A"), self._factors("lora_B")
        self._penalty.add(self.config.orth_reg_weight, optimizer, A, B)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the step, update the scores, allocate where the schedule says so.

        If `update_and_allocate` is called by hand, only the scores: gradients may be gone by then.
        """
        if held := self._in_parts(optimizer):
            self._after_parts(optimizer, held)
            return
        skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer skips steps by itself
        if (skipped is not None and bool(skipped)) or not self._counts(optimizer):
            return
        if self.automatic:
            self._advance(self.step + 1, scores_too=True)
        elif self._scores_at(self.step + 1):
            self._update_scores()
        self._heard = True

    @torch.no_grad()
    def _after_parts(self, optimizer: torch.optim.Optimizer, held: frozenset[int]) -> None:
        """As `after_step`, where DeepSpeed ZeRO steps parts of the adapter, maybe one after the other."""
        parts = self._zero_parts()
        if parts is None:
            return
        if self._scores_at(self.step + 1):
            layers = len(self.layers)
            measured = [
                _ORDER.index(key) * layers + n for key in self.importance.factors for n in range(layers)
            ]
            numbers = [number for number in measured if number in held]
            products = parts.gathered(
                numbers, parts.pieces(optimizer), lambda piece: piece.master * piece.gradient
            )
            known = dict(zip(numbers, products, strict=True))
            self._move_scores([known.get(number) for number in measured])
        self._idle.clear()  # ZeRO has zeros where there was no gradient
        if parts.stepped(held):
            if self.automatic:
                self._advance(self.step + 1, scores_too=False)
            self._heard = True

    def _zero_parts(self) -> ZeroParts | None:
        """The adapter's A, E and B as DeepSpeed ZeRO holds them; None if it doesn't."""
        if self._parts is None and "deepspeed" in sys.modules:
            own = [parameter for key in _ORDER for parameter in self._factors(key)]
            if any(map(partitioned, own)):
                self._parts = ZeroParts(own)
        return self._parts

    def _in_parts(self, optimizer: torch.optim.Optimizer) -> frozenset[int]:
        """Which of `_zero_parts` DeepSpeed is about to step or has stepped with ``optimizer``; mostly none."""
        if "deepspeed" not in sys.modules or self._held_by(optimizer):
            return frozenset()
        (caller, owner), parts = who_steps(), self._zero_parts()
        if caller.startswith("deepspeed.runtime.fp16") and parts is None and self.prunes and not self.fixed:
            raise ValueError(
                "DeepSpeed's half precision without ZeRO steps a flat copy of the parameters, so no rank would ever "
                'change. Set "stage" under "zero_optimization" in its configuration to 1, 2 or 3.'
            )
        return frozenset() if parts is None else parts.held(owner, optimizer)

    def _counts(self, optimizer: torch.optim.Optimizer) -> bool:
        layers = list(self.layers.values())

        def trains(number: int) -> bool:
            kind, place = divmod(number, len(layers))
            parameter: nn.Parameter = getattr(layers[place], _PREFERENCE[kind])[self.adapter]
            return parameter.requires_grad

        return self._turns.end(optimizer, self._held_by(optimizer), trains)

    def update_and_allocate(self, global_step: int) -> None:
        """Count and allocate at the caller's word; from now on only then.

        The step that the optimizer has just taken may have been counted already, and is in the scores already;
        neither happens twice.
        """
        if isinstance(global_step, bool) or not isinstance(global_step, int):
            raise TypeError(
                f"`global_step` must be a whole number of optimizer steps, but is {global_step!r}."
            )
        if global_step < 0:
            raise ValueError(f"`global_step` must be at least 0, but is {global_step}.")
        if self.schedule is None and self.prunes:
            raise ValueError("Pass `total_step` to AdaLoraConfig, or call `model.set_total_step(n)` first.")
        self.automatic = False
        self._advance(global_step, scores_too=not self._heard)

    @torch.no_grad()
    def _advance(self, step: int, scores_too: bool) -> None:
        self.step = step
        schedule = self.schedule
        if schedule is None:
            return
        if self.fixed or not self.prunes:
            if step >= schedule.last_allocation and not self.fixed:
                self._fix()
        else:
            if scores_too and self._scores_at(step):
                self._update_scores()
            if schedule.allocates(step) or step > schedule.last_allocation:
                self._tell_of_idle_layers()
                self._allocate(schedule.budget(step, self.initial, self.target))
            if step >= schedule.last_allocation:
                self._fix()
        if step > schedule.total_step:
            self._tell(
                f"Training goes on past total_step={schedule.total_step}. The ranks stay as they are; "
                "only their values train on."
            )

    def _scores_at(self, step: int) -> bool:
        return self.prunes and not self.fixed and bool(self.schedule and step < self.schedule.last_allocation)

    @torch.no_grad()
    def _update_scores(self) -> None:
        factors = [parameter for key in self.importance.factors for parameter in self._factors(key)]
        gradients = [parameter.grad for parameter in factors]
        if all(gradient is None for gradient in gradients):
            self._tell(
                "An optimizer stepped, but no adapter parameter has a gradient, so nothing is scored. If this goes "
                "on, the adapter does not take part in the loss."
            )
            return
        if self._idle:
            count = len(self.layers)
            self._idle -= {n % count for n, gradient in enumerate(gradients) if gradient is not None}
        weights = [parameter.detach() for parameter in factors]
        filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
        if any(weight.element_size() < 4 for weight in weights):
            weights, filled = [w.float() for w in weights], [g.float() for g in filled]
        products = gather(torch._foreach_mul(weights, filled))
        self._move_scores(
            [None if g is None else product for g, product in zip(gradients, products, strict=True)]
        )

    def _move_scores(self, products: list[Tensor | None]) -> None:
        """Move the scores on by weight times gradient of all A, E and B; None where there is no gradient."""
        device = self._buffer("sensitivity").device
        importance, known = self.importance.measure(products, device)
        counted = update_scores(
            self._buffer("sensitivity"),
            self._buffer("uncertainty"),
            importance,
            self.config.beta1,
            self.config.beta2,
            known,
        )
        self._buffer("skipped").add_(~counted)
        if device.type == "cpu" or self.step % 100 == 0:  # elsewhere reading it would wait for the device
            self._tell_of_skipped_steps()

    def _allocate(self, budget: int) -> None:
        mask = self._buffer("mask")
        scores = self.importance.per_triplet(self._buffer("sensitivity"), self._buffer("uncertainty"))
        frozen = [not parameter.requires_grad for parameter in self._factors(self.importance.decisive)]
        costs = self.layout.costs_on(mask.device) if self.config.gated else None
        if costs is not None:  # a gate that is closed stays closed
            scores = scores.nan_to_num(nan=0.0).masked_fill(~mask, -torch.inf)
        allowance = budget if costs is None else budget * sum(self.layout.costs) // self.initial
        if any(frozen):
            budget, allowance, scores = self._leave_out(frozen, budget, scores, costs)
        tie_order = self._index("tie_order", self.layout.round_robin, mask.device)
        chosen = allocate(scores, allowance, tie_order, costs)
        mask.copy_(chosen if costs is None else mask & chosen)
        E = [layer.lora_E[self.adapter] for layer in self.layers.values()]
        kept = mask.to(E[0].dtype)[:, None].split(self.layout.ranks)
        parts = self._zero_parts()
        if parts is not None:
            parts.multiply(range(len(E), 2 * len(E)), kept)
        else:
            torch._foreach_mul_(
                [local(one) for one in E],
                [local_like(one_mask, one) for one_mask, one in zip(kept, E, strict=True)],
            )
        self.history.record(self.step, budget, self._ranks(mask))

    def _leave_out(
        self, frozen: list[bool], budget: int, scores: Tensor, costs: Tensor | None
    ) -> tuple[int, int, Tensor]:
        """Frozen layers keep the triplets that they have; the others share a budget of their own.

        Returns:
            The whole budget in triplets, the same in what triplets cost, and the scores to allocate by.
        """
        frozen_triplets = self._per_triplet(frozen, scores.device)
        held = self._buffer("mask") & frozen_triplets
        layers = [rank for rank, is_frozen in zip(self.layout.ranks, frozen, strict=True) if not is_frozen]
        initial = sum(layers)
        target = min(self.config.target_r * len(layers), initial)
        share = target if budget == self.target else self._budget_of(initial, target)
        finite = torch.finfo(scores.dtype)
        scores = scores.nan_to_num(nan=finite.min, posinf=finite.max)
        scores = scores.masked_fill(frozen_triplets, -torch.inf).masked_fill(held, torch.inf)
        whole = share + int(held.sum())
        if costs is None:
            return whole, whole, scores
        own = int(costs.masked_fill(frozen_triplets, 0).sum()) * share // max(initial, 1)
        return whole, own + int((costs * held).sum()), scores

    def _budget_of(self, initial: int, target: int) -> int:
        return self.schedule.budget(self.step, initial, target) if self.schedule else initial

    def finalize_ranks(self) -> None:
        """Bring the budget to its target now, by the scores as they are, and fix the choice."""
        if self.fixed:
            return
        if self.prunes:
            with torch.no_grad():
                self._allocate(self.target)
        self._fix()

    def _fix(self) -> None:
        """From here on the forward pass uses the kept triplets only, and a layer without any is its base."""
        self.fixed = True
        kept = self._buffer("mask").cpu().split(self.layout.ranks)
        for layer, layer_mask in zip(self.layers.values(), kept, strict=True):
            if layer_mask.all():
                layer.kept.pop(self.adapter, None)
            else:
                layer.kept[self.adapter] = (
                    layer_mask.nonzero().flatten().to(layer.lora_A[self.adapter].device)
                )

    def take_over(self, kept: dict[str, Tensor], history: RankHistory | None = None) -> None:
        """Fix the choice to ``kept``: module path -> (r,) bool, at which it has arrived by ``history``."""
        if history is not None and history.layers == self.history.layers:
            self.history = history
        self._buffer("mask").copy_(torch.cat([kept[path] for path in self.layers]))
        self._fix()

    # What others ask.

    def allocated_ranks(self) -> dict[str, int]:
        """Module path -> rank by the last allocation."""
        return dict(zip(self.layers, self._ranks(self._buffer("mask")).tolist(), strict=True))

    def kept_triplets(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Module path -> (r,) bool on the CPU: the triplets that a saved adapter holds.

        In the pruning phase a triplet that has grown back since the last allocation still acts, so it is kept:
        its E is looked up in ``state``, a whole state dictionary of the model, or else in the model.
        """
        masks = self._buffer("mask").cpu().split(self.layout.ranks)
        if self.fixed:
            return dict(zip(self.layers, masks, strict=True))
        own = state and [state[f"{path}.lora_E.{self.adapter}"] for path in self.layers]
        grown = [E.detach().flatten().cpu() != 0 for E in own or gather(self._factors("lora_E"))]
        return {path: mask | more for path, mask, more in zip(self.layers, masks, grown, strict=True)}

    def layer_importance(self) -> list[float]:
        """Sum of the scores of each layer's kept triplets; NaN where nothing is scored."""
        if not self.prunes:
            return [float("nan")] * len(self.layers)
        scores = self.importance.per_triplet(self._buffer("sensitivity"), self._buffer("uncertainty"))
        per_layer = (scores * self._buffer("mask")).cpu().split(self.layout.ranks)
        return [float(part.sum()) for part in per_layer]

    def penalty(self) -> Tensor:
        """The orthogonality penalty as it stands, a 0-dim float32 tensor, without its weight."""
        A, B = self._factors("lora_A"), self._factors("lora_B")
        return orthogonality_penalty(gather(A), gather(B))

    def packed_state(self) -> Tensor:
        """Everything that is not in the buffers, as one int64 vector: for the model's extra state."""
        state = RunState(
            step=self.step,
            fixed=self.fixed,
            automatic=self.automatic,
            leader=self._turns.leader,
            schedule=self.schedule,
            target_r=self.config.target_r,
            gated=self.config.gated,
            weights=self._weights(),
            history=self.history,
        )
        return state.to_tensor()

    def check_packed_state(self, packed: Tensor) -> RunState:
        """What `packed_state` gave, unpacked, if it is of this run.

        Raises:
            ValueError: it is damaged, or of a run with other layers, another schedule, target or scale.
        """
        state = RunState.from_tensor(list(self.layers), packed)
        schedule = self.schedule
        if schedule is None and state.schedule is not None:
            schedule = self.config.with_total_step(state.schedule.total_step).resolved_schedule()
        there: dict[str, Any] = {"lora_alpha": state.weights.lora_alpha, "target_r": state.target_r}
        here: dict[str, Any] = {"lora_alpha": self.config.lora_alpha, "target_r": self.config.target_r}
        there["gated"], here["gated"] = state.gated, self.config.gated
        if self.prunes and schedule and state.schedule:
            there |= vars(state.schedule)
            here |= vars(schedule)
        differing = [name for name in here if here[name] != there[name]]
        if differing:
            raise ValueError(
                f"This is the state of a run with {', '.join(f'{name}={there[name]}' for name in differing)}, but "
                f"here the adapter has {', '.join(f'{name}={here[name]}' for name in differing)}. A run goes on "
                "only with the configuration that it began with."
            )
        return state

    def load_packed_state(self, packed: Tensor) -> None:
        """Take over what `packed_state` gave; the buffers have been loaded already.

        Raises:
            ValueError: as `check_packed_state`.
        """
        state = self.check_packed_state(packed)
        if state.schedule is not None and self.schedule is None:
            self.set_total_step(state.schedule.total_step)
        for name, was in vars(state.weights).items():
            value = getattr(self.config, name)
            if value != was:
                self._tell(f"The run goes on with `{name}`={value}; so far it had {was}.")
        self.step, self.automatic, self.history = state.step, state.automatic, state.history
        self.fixed, self._turns = state.fixed, Turns(state.leader)
        for layer in self.layers.values():
            layer.kept.pop(self.adapter, None)
        if self.fixed:
            self._fix()

    def _weights(self) -> RunWeights:
        return RunWeights(**{each.name: getattr(self.config, each.name) for each in fields(RunWeights)})

    # Helpers.

    def _buffer(self, name: str) -> Tensor:
        buffer = self.model.get_buffer(f"rankwise_{name}")
        if buffer.is_floating_point() and buffer.dtype != torch.float32:  # model.half() casts buffers too
            buffer.data = buffer.data.float()
        device = next(iter(self.layers.values())).lora_E[self.adapter].device
        if buffer.device != device and device.type != "meta":  # the model was moved without its buffers
            buffer.data = buffer.data.to(device)
        return buffer

    def _factors(self, key: str) -> list[nn.Parameter]:
        """All A, all E or all B ("lora_A", "lora_E", "lora_B"), in layer order."""
        return [getattr(layer, key)[self.adapter] for layer in self.layers.values()]

    def _ranks(self, mask: Tensor) -> Tensor:
        def layers() -> list[int]:
            return [number for number, rank in enumerate(self.layout.ranks) for _ in range(rank)]

        counts = torch.zeros(len(self.layers), dtype=torch.int64, device=mask.device)
        return counts.index_add_(0, self._index("layers", layers, mask.device), mask.to(torch.int64))

    def _per_triplet(self, per_layer: list[bool], device: torch.device) -> Tensor:
        values = [
            value for value, rank in zip(per_layer, self.layout.ranks, strict=True) for _ in range(rank)
        ]
        return torch.tensor(values, device=device)

    def _index(self, name: str, values: Callable[[], list[int]], device: torch.device) -> Tensor:
        if (name, device) not in self._cache:
            self._cache[name, device] = torch.tensor(values(), device=device)
        index: Tensor = self._cache[name, device]
        return index

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=2)

    def _tell_of_idle_layers(self) -> None:
        """Name the layers that a whole warm-up has left without a gradient, while others had one."""
        trains = [parameter.requires_grad for parameter in self._factors(self.importance.decisive)]
        idle = [path for n, path in enumerate(self.layers) if n in self._idle and trains[n]]
        if idle and self._heard and len(self._idle) < len(self.layers):
            self._tell(
                f"The adapter on {', '.join(map(repr, idle[:3]))}{' and more' if len(idle) > 3 else ''} has had no "
                "gradient in any step so far, so it does not train: the loss goes round the layer, as TRL's goes round "
                "`lm_head`. Leave it out of `target_modules`, or train it whole (`modules_to_save`)."
            )

    def _tell_of_skipped_steps(self) -> None:
        if "skipped" not in self._told and int(self._buffer("skipped")):
            self._told.add("skipped")
            warnings.warn(
                f"Step {self.step}: the adapter's gradients hold NaN or infinite values, so the step is left out of "
                "the importance scores. Further ones are left out too and counted in "
                "`model.allocation_state.skipped_steps`. Lower the learning rate or clip gradients if they go on.",
                stacklevel=2,
            )

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer trains any of this adapter."""
        return bool(self._held_by(optimizer) or self._in_parts(optimizer))

    def _held_by(self, optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
        """Numbers, in `_PREFERENCE`'s order, of the adapter's parameters that the optimizer holds."""
        first = next(iter(self.layers.values())).lora_A[self.adapter]
        mark = (id(first), tuple(len(group["params"]) for group in optimizer.param_groups))
        known = self._held.get(optimizer)
        if known is None or known[0] != mark:
            own = [parameter for kind in _PREFERENCE for parameter in self._factors(kind)]
            if any(not isinstance(p, nn.Parameter) or p.dim() != 2 and not partitioned(p) for p in own):
                raise ValueError(
                    "The adapter's parameters are no matrices any more: FullyShardedDataParallel (FSDP version 1) "
                    "flattens them, and AdaLoRA needs rows and columns. Use `fully_shard` (FSDP version 2)."
                )
            trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            found = tuple(number for number, parameter in enumerate(own) if id(parameter) in trained)
            if not found and any(
                id(layer._parameters.get("weight")) in trained for layer in self.layers.values()
            ):
                self._tell(
                    "An optimizer steps that holds weights of the adapted layers but none of the adapter's, so it "
                    "doesn't train the adapter. Build the optimizer after `get_peft_model`."
                )
            known = self._held[optimizer] = (mark, found)
        held: tuple[int, ...] = known[1]
        return held
