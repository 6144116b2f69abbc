"""Listens to the optimizer and moves the budget of ranks: penalty before its step, scores and allocation after.

A controller acts when the optimizer that holds its adapter's parameters steps; see `rankwise.run.hooks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.adapters import AdapterLayer
from rankwise.config import AdaLoraConfig
from rankwise.method.allocation import allocate
from rankwise.method.penalty import in_blocks, orthogonality_penalty
from rankwise.method.schedule import BudgetSchedule, Phase
from rankwise.method.worth import worth
from rankwise.parallel.sharded import gather
from rankwise.run.gradient_norms import GradientNorms
from rankwise.run.history import RankHistory
from rankwise.run.hooks import Closure, listen, stop_listening
from rankwise.run.optimizers import Optimizers
from rankwise.run.penalty import AddedPenalty
from rankwise.run.scoring import Scoring
from rankwise.run.state import AllocationState, RunState, RunWeights
from rankwise.run.told import Told
from rankwise.run.triplets import Triplets
from rankwise.run.turning import Turned, mean_strengths

_UNUSED = 1  # numbers in the averages of a run that prunes nothing: some file formats take two empty tensors for one


class Controller:
    """Runs AdaLoRA for one adapter of one model.

    What must survive a checkpoint is kept in buffers of the model (scores and mask) and in `packed_state`, so that
    the model's own ``state_dict`` carries it through any trainer.

    Args:
        model: the adapted model; the buffers are registered on it.
        layers: module path -> adapted layer, in model order.
        adapter: the adapter's name.
        config: its configuration.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, AdapterLayer], adapter: str, config: AdaLoraConfig
    ) -> None:
        self.adapter, self.config = adapter, config
        self.triplets = Triplets(model, layers, adapter)
        self.schedule: BudgetSchedule | None = None
        if config.total_step is not None:
            self.schedule = config.resolved_schedule()
        self.step = 0
        self.fixed = False  # the choice of ranks is final
        self.automatic = True  # steps are counted here, and not by calls of update_and_allocate
        self.history = RankHistory(self.triplets.names)
        self.history.record(0, self.initial, list(self.triplets.layout.block_ranks))
        self._tell = Told()
        self._tell_of_unused_penalty()
        self._penalty = AddedPenalty(self.triplets)
        self._optimizers = Optimizers(self.triplets, self._tell)
        self._heard = False  # an optimizer's steps are heard of, so that scores need no call by hand
        importance = config.form.importance(self.triplets.layout)
        self._watch: Scoring | GradientNorms = GradientNorms(self.triplets, self._tell)
        if importance is not None:
            self._watch = Scoring(self.triplets, importance, (config.beta1, config.beta2), self._tell)
        self.triplets.register_buffers(self._watch.entries if self.prunes else _UNUSED)
        if any(adapter in layer.kept for layer in layers.values()):  # chosen before it was loaded
            self.triplets.mask.copy_(self.triplets.acting())
            self._fix()
        listen(self)

    def detach(self) -> None:
        """Stop listening and take the buffers off the model."""
        stop_listening(self)
        self.triplets.remove_buffers()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_heard": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        listen(self)

    # Budget and schedule.

    @property
    def initial(self) -> int:
        """Triplets at the start."""
        return self.triplets.layout.triplets

    @property
    def target(self) -> int:
        """Triplets in the end: ``target_r`` per block, or all if the adapter has no more than that."""
        layout = self.triplets.layout
        blocks = len(layout.block_ranks)
        target = round(self.config.target_r * blocks)
        # Many narrow triplets, as a run leaves behind that has ended, may cost no more than so many average ones.
        paid = layout.cost * blocks <= target * layout.costs_of_one_rank
        return self.initial if self.config.form.counts_parameters and paid else min(target, self.initial)

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
            skipped_steps=int(self.triplets.buffer("skipped")),
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
        counted = self.config.form.counts_parameters
        return self.history.records[-1].budget if counted else int(self.triplets.mask.sum())

    # One optimizer step.

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer trains any of this adapter."""
        return bool(self._optimizers.held_by(optimizer) or self._in_parts(optimizer))

    def before_step(self, optimizer: Optimizer, closure: Closure | None = None) -> Closure | None:
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
        weight = self.config.orth_reg_weight
        if weight and isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS compares values of the loss within a step, and the orthogonality penalty is in no loss: "
                f"set `orth_reg_weight=0` (it is {weight}), or use another optimizer."
            )
        held, parts = self._in_parts(optimizer), self._optimizers.zero_parts()
        if held and parts is not None:
            self._penalty.add_to_parts(weight, optimizer, parts, held)
            return closure
        if not self._optimizers.begin(optimizer) or not weight:
            return closure
        if closure is None:
            self._penalty.add(weight, optimizer)
            return None

        def penalized() -> Any:
            loss = closure()
            self._penalty.add(weight, optimizer)
            return loss

        return penalized

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step, update the scores, allocate where the schedule says so.

        If `update_and_allocate` is called by hand, only the scores: gradients may be gone by then.
        """
        if held := self._in_parts(optimizer):
            return self._after_parts(optimizer, held)
        skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer skips steps by itself
        if (skipped is not None and bool(skipped)) or not self._optimizers.counts(optimizer):
            return
        if self.automatic:
            self._advance(self.step + 1, scores_too=True)
        elif self._scores_at(self.step + 1):
            with torch.no_grad():
                self._watch.update(self.step)
        self._heard = True

    @torch.no_grad()
    def _after_parts(self, optimizer: Optimizer, held: frozenset[int]) -> None:
        """As `after_step`, where DeepSpeed ZeRO steps parts of the adapter, maybe one after the other."""
        parts = self._optimizers.zero_parts()
        if parts is None:
            return
        if self._scores_at(self.step + 1):
            self._watch.update_from_parts(parts, held, optimizer, self.step)
        self._watch.all_had_gradients()
        if parts.stepped(held):
            if self.automatic:
                self._advance(self.step + 1, scores_too=False)
            self._heard = True

    def _in_parts(self, optimizer: Optimizer) -> frozenset[int]:
        return self._optimizers.in_parts(optimizer, self.prunes and not self.fixed)

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
                self._watch.update(step)
            if schedule.allocates(step) or step > schedule.last_allocation:
                if self._heard:
                    self._watch.tell_of_idle_layers()
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

    # Allocation.

    def _allocate(self, budget: int) -> None:
        """Keep what ``budget``, in triplets of average size, is enough for."""
        triplets, layout, form = self.triplets, self.triplets.layout, self.config.form
        parts, final = self._optimizers.zero_parts(), budget == self.target
        if isinstance(self._watch, Scoring):
            turned, mask, scores = None, triplets.mask, self._watch.per_triplet()
        else:
            turned = Turned(triplets, parts)
            mask, scores = turned.acts(), self._worth(turned.strengths(), self._watch)
        costs = layout.costs_on(mask.device) if form.counts_parameters else None
        if not form.grows_back:
            scores = scores.nan_to_num(nan=0.0).masked_fill(~mask, -torch.inf)
        unreached = triplets.unreached()
        if unreached is not None:
            scores = scores.masked_fill(unreached, -torch.inf)
        allowance = budget if costs is None else budget * layout.cost // self.initial
        frozen = self._watch.frozen()
        if any(frozen):
            budget, allowance, scores = self._leave_out(frozen, budget, scores, costs)
        tie_order = triplets.index("tie_order", layout.round_robin, mask.device)
        chosen = allocate(scores, allowance, tie_order, costs)
        if final and unreached is not None:  # and what is left over is no use to them
            chosen &= ~unreached
        triplets.mask.copy_(chosen if form.grows_back else mask & chosen)
        louder = self._louder(frozen)
        if turned is not None and louder is not None:
            turned.put_in(louder, self._optimizers.known())
        triplets.close(triplets.mask, parts, louder)
        self.history.record(self.step, budget, triplets.ranks())

    def _louder(self, frozen: list[bool]) -> Tensor | None:
        """What the E that stay are multiplied by, (triplets,); None: 1. Layers that don't train stay as they are."""
        gates = self.config.form.gates(
            self.config.init_r, self.triplets.average_rank(), self.config.use_rslora
        )
        if gates is None:
            return None
        now = self.triplets.open_gates()
        same = now == 0  # nothing was left of the layer
        if any(frozen):
            same |= self.triplets.spread_layers(frozen, now.device)
        return torch.where(same, 1.0, gates / now)

    def _worth(self, strengths: Tensor, gradients: GradientNorms) -> Tensor:
        """What directions are worth for what they cost, (triplets,), by their strengths in B A."""
        costs = self.triplets.layout.costs_on(strengths.device)
        norms = gradients.per_triplet()
        return worth(strengths * self.triplets.open_gates(), norms, costs, self.config.target_r)

    def _leave_out(
        self, frozen: list[bool], budget: int, scores: Tensor, costs: Tensor | None
    ) -> tuple[int, int, Tensor]:
        """Frozen layers keep the triplets that they have; the others share a budget of their own.

        Returns:
            The whole budget in triplets, the same in what triplets cost, and the scores to allocate by.
        """
        frozen_triplets = self.triplets.spread_layers(frozen, scores.device)
        held = self.triplets.mask & frozen_triplets
        layout = self.triplets.layout
        counts = layout.block_counts
        initial = sum(rank for rank, is_frozen in zip(layout.ranks, frozen, strict=True) if not is_frozen)
        blocks = sum(count for count, is_frozen in zip(counts, frozen, strict=True) if not is_frozen)
        target = min(round(self.config.target_r * blocks), initial)
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
        """Bring the budget to its target now, as things are, and fix the choice."""
        if self.fixed:
            return
        if self.prunes:
            with torch.no_grad():
                self._allocate(self.target)
        self._fix()

    def _fix(self) -> None:
        self.fixed = True
        self.triplets.fix()

    def take_over(self, kept: dict[str, Tensor], history: RankHistory | None = None) -> None:
        """Fix the choice to ``kept``: module path -> (r,) bool, at which it has arrived by ``history``."""
        if history is not None and history.layers == self.history.layers:
            self.history = history
        self.triplets.mask.copy_(torch.cat([kept[path] for path in self.triplets.layers]))
        self._fix()

    # What others ask.

    def allocated_ranks(self) -> dict[str, int]:
        """Name of each block (mostly the module's path) -> rank by the last allocation."""
        return dict(zip(self.triplets.names, self.triplets.ranks().tolist(), strict=True))

    def kept_triplets(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Module path -> (r,) bool on the CPU: the triplets that a saved adapter holds; see `Triplets.kept`."""
        return self.triplets.kept(self.fixed, state)

    def layer_importance(self) -> list[float]:
        """What each block's kept triplets are worth together; NaN where nothing can be pruned."""
        if not self.prunes:
            return [float("nan")] * len(self.triplets.names)
        if isinstance(self._watch, Scoring):
            scores = self._watch.per_triplet() * self.triplets.mask
        else:
            strengths = mean_strengths(self.triplets, self._optimizers.zero_parts())
            scores = self._worth(strengths, self._watch)
        return [float(part.sum()) for part in scores.cpu().split(self.triplets.layout.block_ranks)]

    def penalty(self) -> Tensor:
        """The orthogonality penalty as it stands, a 0-dim float32 tensor, without its weight."""
        blocks = self.triplets.layout.block_counts
        A, B = self.triplets.factors("lora_A"), self.triplets.factors("lora_B")
        return orthogonality_penalty(
            in_blocks(gather(A), blocks, columns=False), in_blocks(gather(B), blocks, columns=True)
        )

    # The state that is not in the buffers.

    def packed_state(self) -> Tensor:
        """Everything that is not in the buffers, as one int64 vector: for the model's extra state."""
        return self._run_state().to_tensor()

    def _run_state(self) -> RunState:
        return RunState(
            step=self.step,
            fixed=self.fixed,
            automatic=self.automatic,
            leader=self._optimizers.leader,
            schedule=self.schedule,
            target_r=self.config.target_r,
            form=self.config.form.name,
            weights=RunWeights.of(self.config),
            history=self.history,
        )

    def check_packed_state(self, packed: Tensor) -> RunState:
        """What `packed_state` gave, unpacked, if it is of this run.

        Raises:
            ValueError: it is damaged, or of a run with other layers, another schedule, target or scale.
        """
        state = RunState.from_tensor(self.triplets.names, packed)
        schedule = self.schedule
        if schedule is None and state.schedule is not None:
            schedule = self.config.with_total_step(state.schedule.total_step).resolved_schedule()
        state.check_same_run(self._run_state(), schedule if self.prunes else None)
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
        self.fixed = state.fixed
        self._optimizers = Optimizers(self.triplets, self._tell, state.leader)
        self.triplets.unfix()
        if self.fixed:
            self._fix()

    def _tell_of_unused_penalty(self) -> None:
        weight, form = self.config.orth_reg_weight, self.config.form
        if weight and not form.orth_reg_weight:
            self._tell(
                f"`orth_reg_weight`={weight} belongs to the paper's form of AdaLoRA, which PEFT "
                "has. This is the other form, which starts and learns as LoRA does, and needs no penalty, as it turns "
                "its layers into principal directions exactly: leave `orth_reg_weight` out. For PEFT's form set "
                "`init_lora_weights=True`."
            )
