"""The state of a run: as its user sees it, and packed into one tensor, which any trainer's checkpoint carries.

Scores and masks are in the model's buffers. The packed tensor holds the rest: the step, the run's settings and its
history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rankwise.config import AdaLoraConfig
from rankwise.method.schedule import BudgetSchedule
from rankwise.run.history import RankHistory

# The packed tensor: [_LAYOUT, the counters, the schedule, target_r, the form, the bits of the weights, the number of
# scales, the bits of the scales, the history]. Layout 2, of earlier versions, has no scales.
_LAYOUT, _WITHOUT_SCALES = 3, 2
_WHOLE = 11
_FORMS = ("paper", "gated", "principal")  # a form's index is its number in the packed tensor


@dataclass(frozen=True)
class AllocationState:
    """The state of a run.

    Args:
        step: the number of optimizer steps taken.
        phase: ``"warm-up"``, ``"pruning"`` or ``"final"``.
        budget: the number of ranks that may stay after this step. In the default form, whose budget counts parameters,
            these are ranks of average size.
        target: the number of ranks that may stay at the end.
        initial: the number of ranks at the start.
        skipped_steps: the number of steps with NaN or infinite gradients. They are left out of the scores.
        total_step: the number of optimizer steps in the whole run; None while it is unknown.

    Example:
        >>> state = AllocationState(50, "pruning", 80, 64, 96, 0, 100)
        >>> state.reached_target
        False
        >>> AllocationState(100, "final", 60, 64, 96, 0, 100).reached_target  # fewer ranks than the target allows
        True
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
        """Whether the budget is at its target or below."""
        return self.budget <= self.target


@dataclass(frozen=True)
class RunWeights:
    """The settings of a run that are not integers. The fields are those of `AdaLoraConfig`."""

    lora_alpha: float
    lora_dropout: float
    beta1: float
    beta2: float
    orth_reg_weight: float

    @classmethod
    def of(cls, config: AdaLoraConfig) -> RunWeights:
        """Take them from a configuration."""
        return cls(**{each.name: getattr(config, each.name) for each in fields(cls)})


@dataclass(frozen=True)
class RunState:
    """A run between two optimizer steps.

    Args:
        step: the number of optimizer steps taken.
        fixed: whether the choice of ranks is final.
        automatic: whether steps are counted by listening to the optimizer.
        leader: the number of the factor whose optimizer counts the steps; None before the first step.
        schedule: the schedule; None while the length of the run is unknown.
        target_r: the average rank at the end.
        form: the name of the method's form.
        weights: the other settings.
        scales: the current scale of every layer; empty if unknown, as in the states of earlier versions.
        history: the cuts so far.
    """

    step: int
    fixed: bool
    automatic: bool
    leader: int | None
    schedule: BudgetSchedule | None
    target_r: float
    form: str
    weights: RunWeights
    scales: tuple[float, ...]
    history: RankHistory

    def to_tensor(self) -> Tensor:
        """Pack the state, without the layers' names, into a 1-D int64 tensor on the CPU."""
        plan = self.schedule
        leader = -1 if self.leader is None else self.leader
        whole = [_LAYOUT, self.step, self.fixed, self.automatic, leader]
        whole += [plan.tinit, plan.tfinal, plan.total_step, plan.deltaT] if plan else [0] * 4
        bits = torch.tensor(
            [float(value) for value in vars(self.weights).values()], dtype=torch.float64, device="cpu"
        )
        head = torch.tensor(
            [*whole, _packed_rank(self.target_r), _FORMS.index(self.form)], dtype=torch.int64, device="cpu"
        )
        scales = torch.tensor(self.scales, dtype=torch.float64, device="cpu").view(torch.int64)
        count = torch.tensor([len(scales)], dtype=torch.int64, device="cpu")
        return torch.cat([head, bits.view(torch.int64), count, scales, self.history.to_tensor()])

    @classmethod
    def from_tensor(cls, layers: Sequence[str], packed: Tensor) -> RunState:
        """Unpack the result of `to_tensor`.

        Args:
            layers: the names of the run's blocks.
            packed: the packed state, 1-D, int64.

        Raises:
            ValueError: the tensor is not a packed state, its number of layers differs, or its numbers make no sense.

        Example:
            >>> from rankwise.method.schedule import BudgetSchedule
            >>> state = RunState(3, False, True, 0, BudgetSchedule(1, 2, 9), 0.5, "principal",
            ...                  RunWeights(8, 0.1, 0.8, 0.9, 0.5), (2.0,), RankHistory(["fc"]))
            >>> RunState.from_tensor(["fc"], state.to_tensor()) == state
            True
        """
        start = _WHOLE + len(fields(RunWeights))
        if packed.dtype is not torch.int64 or packed.dim() != 1 or packed.numel() < start:
            raise ValueError(
                f"The state of a run is a 1-D int64 tensor of {start} or more values, but this is {packed.dtype} of "
                f"shape {tuple(packed.shape)}."
            )
        packed = packed.cpu()
        whole = packed[:_WHOLE].tolist()
        layout, step, fixed, automatic, leader, tinit, tfinal, total, deltaT, target, form = whole
        if layout not in (_LAYOUT, _WITHOUT_SCALES):
            raise ValueError(
                f"The state of the run has layout {layout}; this version of rankwise reads {_WITHOUT_SCALES} and "
                f"{_LAYOUT}."
            )
        flags = {fixed, automatic} <= {0, 1} and 0 <= form < len(_FORMS)
        sensible = step >= 0 and flags and leader >= -1 and target != 0
        weights = packed[_WHOLE:start].view(torch.float64)
        if not sensible or not weights.isfinite().all():
            raise ValueError("The state of the run holds numbers that no run has: it is damaged.")
        scales = packed[:0].view(torch.float64)
        if layout == _LAYOUT:
            count = int(packed[start]) if packed.numel() > start else -1
            if not 0 <= count <= packed.numel() - start - 1:
                raise ValueError("The state of the run is cut off.")
            scales = packed[start + 1 : start + 1 + count].view(torch.float64)
            start += 1 + count
            if not (scales.isfinite() & (scales != 0)).all():
                raise ValueError("The state of the run holds a scale that no layer has: it is damaged.")
        history = RankHistory.from_tensor(layers, packed[start:])
        return cls(
            step=step,
            fixed=bool(fixed),
            automatic=bool(automatic),
            leader=None if leader < 0 or layout != _LAYOUT else leader,
            schedule=BudgetSchedule(tinit, tfinal, total, deltaT) if total else None,
            target_r=_rank(target),
            form=_FORMS[form],
            weights=RunWeights(*weights.tolist()),
            scales=tuple(scales.tolist()),
            history=history,
        )

    def check_same_run(self, here: RunState, schedule: BudgetSchedule | None) -> None:
        """Check that the run ``here`` may continue from this state.

        Args:
            here: the current state of the run that is to continue.
            schedule: that run's schedule, or the one it would have with this state's length; None if nothing is
                pruned.

        Raises:
            ValueError: the two runs differ.
        """
        if self.scales and len(self.scales) != len(here.scales):
            raise ValueError(
                f"The state of the run has scales of {len(self.scales)} layers, but the adapter has "
                f"{len(here.scales)}: it is damaged."
            )
        was: dict[str, Any] = {
            "lora_alpha": self.weights.lora_alpha,
            "target_r": self.target_r,
            "form": self.form,
        }
        now: dict[str, Any] = {
            "lora_alpha": here.weights.lora_alpha,
            "target_r": here.target_r,
            "form": here.form,
        }
        if schedule and self.schedule:
            was |= vars(self.schedule)
            now |= vars(schedule)
        differing = [name for name in now if now[name] != was[name]]
        if differing:
            raise ValueError(
                f"This is the state of a run with {', '.join(f'{name}={was[name]}' for name in differing)}, but "
                f"here the adapter has {', '.join(f'{name}={now[name]}' for name in differing)}. A run can "
                "only continue with the configuration that it began with."
            )


# The average rank at the end is usually an integer. Any other number is packed as the bits of a float, negated:
# the sign distinguishes it from an integer rank.


def _packed_rank(rank: float) -> int:
    if rank == int(rank):
        return int(rank)
    return -int(torch.tensor([rank], dtype=torch.float64, device="cpu").view(torch.int64))


def _rank(packed: int) -> float:
    return (
        packed
        if packed > 0
        else float(torch.tensor([-packed], dtype=torch.int64, device="cpu").view(torch.float64))
    )
