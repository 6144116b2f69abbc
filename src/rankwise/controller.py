"""Listens to the optimizer and moves the budget of ranks: penalty before its step, scores and allocation after.

PyTorch calls a program back around every ``Optimizer.step``. A controller acts when the optimizer that holds its
adapter's parameters steps, so that allocation happens in any training loop, once per optimizer step: under
gradient accumulation, under a GradScaler that skips steps, and in trainers that know nothing of it.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rankwise.adapters import AdapterLayer
from rankwise.allocate import allocate
from rankwise.config import AdaLoraConfig
from rankwise.history import RankHistory
from rankwise.penalty import orthogonality_gradients, orthogonality_penalty
from rankwise.schedule import BudgetSchedule, Phase
from rankwise.scores import TripletLayout, flatten, triplet_scores, update_scores

BUFFERS = ("rankwise_sensitivity", "rankwise_uncertainty", "rankwise_mask", "rankwise_skipped")

_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()


@dataclass(frozen=True)
class AllocationState:
    """Where a run stands.

    Args:
        step: optimizer steps taken.
        phase: "warm-up", "pruning" or "final".
        budget: triplets that stay after this step.
        target: triplets that stay in the end.
        initial: triplets at the start.
        skipped_steps: steps left out of the scores because of NaN or infinite gradients.
        total_step: steps of the whole run, or None while unknown.
    """

    step: int
    phase: str
    budget: int
    target: int
    initial: int
    skipped_steps: int
    total_step: int | None

    @property
    def reached_target(self) -> bool:
        """Whether the budget has come down to its target."""
        return self.budget == self.target


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
        self.model, self.layers, self.adapter, self.config = model, layers, adapter, config
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
        self._cache: dict[Any, Any] = {}
        device = factors[0]["lora_A"].device
        elements = self.layout.elements if self.prunes else 0
        values = (
            torch.zeros(elements, device=device),
            torch.zeros(elements, device=device),
            torch.ones(self.initial, dtype=torch.bool, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )
        for name, value in zip(BUFFERS, values, strict=True):
            model.register_buffer(name, value)
        _controllers.add(self)

    def detach(self) -> None:
        """Stop listening and take the buffers off the model."""
        _controllers.discard(self)
        for name in BUFFERS:
            delattr(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _controllers.add(self)

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
            phase, budget = Phase.FINAL, int(self._buffer("mask").sum())
        elif self.schedule is None:
            phase, budget = Phase.WARMUP, self.initial
        else:
            phase = self.schedule.phase(max(self.step, 1))
            budget = self.schedule.budget(self.step, self.initial, self.target)
        return AllocationState(
            step=self.step,
            phase=str(phase),
            budget=budget,
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
        """Warn, once, that an adapter is saved before its budget has come down."""
        state = self.state()
        if state.step > 0 and state.budget > self.target:
            self._tell(
                f"The adapter is saved at step {state.step} with {state.budget} triplets; its target is {self.target}, "
                f"which the schedule reaches at step {self.schedule.last_allocation if self.schedule else '?'}. If "
                "training ends here, call `model.finalize_ranks()` and save again."
            )

    # One optimizer step.

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the penalty's gradient to ``.grad``."""
        if self.schedule is None and self.automatic:
            raise ValueError(
                "The length of the run is not known: pass `total_step` to AdaLoraConfig, or call "
                "`model.set_total_step(n)` with the number of optimizer steps before the first one."
            )
        if not self.config.orth_reg_weight:
            return
        rows, gradients = self._penalized(held_by=optimizer)
        if not gradients:
            return
        added = orthogonality_gradients(rows, self.config.orth_reg_weight, count=2 * len(self.layers))
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer's gradients are still scaled
        if scale is not None:
            torch._foreach_mul_(added, scale)
        torch._foreach_add_(gradients, [a.to(g.dtype) for a, g in zip(added, gradients, strict=True)])

    def after_step(self) -> None:
        """Count the step, update the scores, allocate where the schedule says so."""
        if self.automatic:
            self._advance(self.step + 1, scores_too=True)

    def update_and_allocate(self, global_step: int) -> None:
        """Do what `after_step` does, at the caller's word; from now on only then.

        The step that the optimizer has just taken may have been counted already; it isn't counted twice.
        """
        if isinstance(global_step, bool) or not isinstance(global_step, int):
            raise TypeError(
                f"`global_step` must be a whole number of optimizer steps, but is {global_step!r}."
            )
        if global_step < 0:
            raise ValueError(f"`global_step` must be at least 0, but is {global_step}.")
        if self.schedule is None:
            raise ValueError("Pass `total_step` to AdaLoraConfig, or call `model.set_total_step(n)` first.")
        counted = self.automatic and self.step > 0
        self.automatic = False
        if counted and global_step == self.step:
            return
        self._advance(global_step, scores_too=not counted)

    @torch.no_grad()
    def _advance(self, step: int, scores_too: bool) -> None:
        schedule = self.schedule
        if schedule is None:
            return
        self.step = step
        if self.fixed or not self.prunes:
            if step >= schedule.last_allocation and not self.fixed:
                self._fix()
        else:
            if scores_too and step < schedule.last_allocation:
                self._update_scores()
            if schedule.allocates(step) or step > schedule.last_allocation:
                self._allocate(schedule.budget(step, self.initial, self.target))
            if step >= schedule.last_allocation:
                self._fix()
        if step > schedule.total_step:
            self._tell(
                f"Training goes on past total_step={schedule.total_step}. The ranks stay as they are; "
                "only their values train on."
            )

    def _update_scores(self) -> None:
        factors = self._factors()
        gradients = [parameter.grad for parameter in factors]
        if all(gradient is None for gradient in gradients):
            self._tell(
                "The optimizer stepped, but no adapter parameter has a gradient, so importance can't be scored. "
                "Call `update_and_allocate` before `zero_grad`, or don't call it at all: it is automatic."
            )
            return
        device = self._buffer("sensitivity").device
        known = None
        if any(gradient is None for gradient in gradients):
            sizes = torch.tensor([parameter.numel() for parameter in factors], device=device)
            present = torch.tensor([gradient is not None for gradient in gradients], device=device)
            known = present.repeat_interleave(sizes, output_size=self.layout.elements)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(factors, gradients, strict=True)]
        counted = update_scores(
            self._buffer("sensitivity"),
            self._buffer("uncertainty"),
            flatten([_whole(parameter) for parameter in factors], device),
            flatten([_whole(gradient) for gradient in filled], device),
            self.config.beta1,
            self.config.beta2,
            known,
        )
        self._buffer("skipped").add_(~counted)
        if device.type == "cpu" or self.step % 100 == 0:  # elsewhere reading it would wait for the device
            self._tell_of_skipped_steps()

    def _allocate(self, budget: int) -> None:
        mask = self._buffer("mask")
        scores = triplet_scores(self.layout, self._buffer("sensitivity"), self._buffer("uncertainty"))
        frozen = [not layer.lora_E[self.adapter].requires_grad for layer in self.layers.values()]
        if any(frozen):
            budget, scores = self._leave_out(frozen, budget, scores)
        mask.copy_(allocate(scores, budget, self._index("tie_order", self.layout.round_robin(), mask.device)))
        E = [layer.lora_E[self.adapter] for layer in self.layers.values()]
        kept = mask.to(E[0].dtype)[:, None].split(self.layout.ranks)
        torch._foreach_mul_(
            [_local(one) for one in E],
            [_local_like(one_mask, one) for one_mask, one in zip(kept, E, strict=True)],
        )
        self.history.record(self.step, budget, self._ranks(mask))

    def _leave_out(self, frozen: list[bool], budget: int, scores: Tensor) -> tuple[int, Tensor]:
        """Frozen layers keep the triplets that they have; the others share a budget of their own."""
        frozen_triplets = self._per_triplet(frozen, scores.device)
        held = self._buffer("mask") & frozen_triplets
        layers = [rank for rank, is_frozen in zip(self.layout.ranks, frozen, strict=True) if not is_frozen]
        initial = sum(layers)
        target = min(self.config.target_r * len(layers), initial)
        share = target if budget == self.target else self._budget_of(initial, target)
        scores = scores.masked_fill(frozen_triplets, -torch.inf).masked_fill(held, torch.inf)
        return share + int(held.sum()), scores

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

    def take_over(self, kept: dict[str, Tensor]) -> None:
        """Fix the choice to ``kept``: module path -> (r,) bool."""
        self._buffer("mask").copy_(torch.cat([kept[path] for path in self.layers]))
        self._fix()

    # What others ask.

    def allocated_ranks(self) -> dict[str, int]:
        """Module path -> rank by the last allocation."""
        return dict(zip(self.layers, self._ranks(self._buffer("mask")).tolist(), strict=True))

    def kept_triplets(self) -> dict[str, Tensor]:
        """Module path -> (r,) bool on the CPU: the triplets that a saved adapter holds.

        In the pruning phase a triplet that has grown back since the last allocation still acts, so it is kept.
        """
        masks = self._buffer("mask").cpu().split(self.layout.ranks)
        if self.fixed:
            return dict(zip(self.layers, masks, strict=True))
        grown = [
            _whole(layer.lora_E[self.adapter]).detach().flatten().cpu() != 0 for layer in self.layers.values()
        ]
        return {path: mask | more for path, mask, more in zip(self.layers, masks, grown, strict=True)}

    def layer_importance(self) -> list[float]:
        """Sum of the scores of each layer's kept triplets; NaN where nothing is scored."""
        if not self.prunes:
            return [float("nan")] * len(self.layers)
        scores = triplet_scores(self.layout, self._buffer("sensitivity"), self._buffer("uncertainty"))
        per_layer = (scores * self._buffer("mask")).cpu().split(self.layout.ranks)
        return [float(part.sum()) for part in per_layer]

    def penalty(self) -> Tensor:
        """The orthogonality penalty as it stands, a 0-dim float32 tensor, without its weight."""
        rows, _ = self._penalized()
        return orthogonality_penalty(rows)

    def packed_state(self) -> Tensor:
        """Everything that is not in the buffers, as one int64 vector: for the model's extra state."""
        total = self.schedule.total_step if self.schedule else 0
        head = torch.tensor([self.step, self.fixed, self.automatic, total], dtype=torch.int64)
        return torch.cat([head, self.history.to_tensor()])

    def load_packed_state(self, packed: Tensor) -> None:
        """Take over what `packed_state` gave; the buffers have been loaded already.

        Raises:
            ValueError: it belongs to another adapter.
        """
        packed = packed.cpu()
        history = RankHistory.from_tensor(list(self.layers), packed[4:])
        step, fixed, automatic, total = packed[:4].tolist()
        if total and self.schedule is None:
            self.set_total_step(total)
        self.step, self.automatic, self.history = step, bool(automatic), history
        self.fixed = bool(fixed)
        for layer in self.layers.values():
            layer.kept.pop(self.adapter, None)
        if self.fixed:
            self._fix()

    # Helpers.

    def _buffer(self, name: str) -> Tensor:
        buffer = self.model.get_buffer(f"rankwise_{name}")
        if buffer.is_floating_point() and buffer.dtype != torch.float32:  # model.half() casts buffers too
            buffer.data = buffer.data.float()
        return buffer

    def _factors(self) -> list[nn.Parameter]:
        """All A, then all E, then all B, as the layout has them."""
        held = [layer.adapter_parameters(self.adapter) for layer in self.layers.values()]
        return [factors[key] for key in ("lora_A", "lora_E", "lora_B") for factors in held]

    def _penalized(self, held_by: torch.optim.Optimizer | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Rows of all A and B, each (r, width), and the gradients to add to, in the same orientation."""
        held = None
        if held_by is not None:
            held = {id(parameter) for group in held_by.param_groups for parameter in group["params"]}
        rows, gradients = [], []
        for layer in self.layers.values():
            for key in ("lora_A", "lora_B"):
                parameter = layer.adapter_parameters(self.adapter)[key]
                turn = key == "lora_B"
                if held is not None:
                    if id(parameter) not in held or parameter.grad is None:
                        continue
                    gradients.append(parameter.grad.T if turn else parameter.grad)
                rows.append(parameter.detach().T if turn else parameter.detach())
        return rows, gradients

    def _ranks(self, mask: Tensor) -> Tensor:
        layers = [number for number, rank in enumerate(self.layout.ranks) for _ in range(rank)]
        counts = torch.zeros(len(self.layers), dtype=torch.int64, device=mask.device)
        return counts.index_add_(0, self._index("layers", layers, mask.device), mask.to(torch.int64))

    def _per_triplet(self, per_layer: list[bool], device: torch.device) -> Tensor:
        values = [
            value for value, rank in zip(per_layer, self.layout.ranks, strict=True) for _ in range(rank)
        ]
        return torch.tensor(values, device=device)

    def _index(self, name: str, values: list[int], device: torch.device) -> Tensor:
        if (name, device) not in self._cache:
            self._cache[name, device] = torch.tensor(values, device=device)
        index: Tensor = self._cache[name, device]
        return index

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=2)

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
        """Whether this optimizer trains this adapter."""
        first = next(iter(self.layers.values())).lora_A[self.adapter]
        sizes = tuple(len(group["params"]) for group in optimizer.param_groups)
        key = ("optimizer", id(optimizer))
        known = self._cache.get(key)
        if known is None or known[0]() is not optimizer or known[1] != (id(first), sizes):
            own = {id(parameter) for parameter in self._factors()}
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            found = not own.isdisjoint(trained)
            if not found and any(id(p) in trained for p in self.model.parameters()):
                self._tell(
                    "An optimizer steps that holds parameters of the adapted model but none of its adapter's, so it "
                    "doesn't train the adapter. Build the optimizer after `get_peft_model`."
                )
            known = self._cache[key] = (weakref.ref(optimizer), (id(first), sizes), found)
        return bool(known[2])


def _whole(tensor: Any) -> Tensor:
    """A sharded tensor (DTensor) gathered from all its processes; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.data  # type: ignore[no-any-return]


def _local_like(values: Tensor, like: Any) -> Tensor:
    """The part of ``values`` that corresponds to the local shard of ``like``, in its dtype and on its device."""
    values = values.to(device=like.device, dtype=like.dtype)
    if hasattr(like, "to_local"):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = like.device_mesh
        whole = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return whole.redistribute(mesh, like.placements).to_local()
    return values


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for controller in list(_controllers):
        if controller.holds(optimizer):
            controller.before_step(optimizer)


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for controller in list(_controllers):
        if controller.holds(optimizer):
            controller.after_step()


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)
