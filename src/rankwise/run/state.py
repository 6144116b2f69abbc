"""Where a run is: for its user, and packed into one tensor, so that any trainer's checkpoint carries it.

Scores and masks lie in the model's buffers. The rest is in that tensor: the step, what the
run was set to, and its history.
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

# The packed tensor: [_LAYOUT, the counters, the schedule, target_r, the form, the weights' bits, how many scales there
# are, the scales' bits, the history]. Layout 2, of earlier versions, has no scales.
_LAYOUT, _WITHOUT_SCALES = 3, 2
_WHOLE = 11
_FORMS = ("paper", "gated", "principal")  # by their number in the packed tensor


@dataclass(frozen=True)
class AllocationState:
    """Where a run stands.

    Args:
        step: optimizer steps taken.
        phase: "warm-up", "pruning" or "final".
        budget: triplets that may stay after this step: of average size, where the form's budget counts parameters.
        target: the same in the end.
        initial: triplets at the start.
        skipped_steps: steps with NaN or infinite gradients, which no score takes in.
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


@dataclass(frozen=True)
class RunWeights:
    """The settings of a run that are not whole numbers; fields as in `AdaLoraConfig`."""

    lora_alpha: float
    lora_dropout: float
    beta1: float
    beta2: float
    orth_reg_weight: float

    @classmethod
    def of(cls, config: AdaLoraConfig) -> RunWeights:
        """Those of a configuration."""
        return cls(**{each.name: getattr(config, each.name) for each in fields(cls)})


@dataclass(frozen=True)
class RunState:
    """A run at a moment between two optimizer steps.

    Args:
        step: optimizer steps taken.
        fixed: the choice of ranks is final.
        automatic: steps are counted by listening to the optimizer.
        leader: number of the parameter whose optimizer counts the steps; None before the first.
        schedule: None if the length of the run is not known.
        target_r: average rank in the end.
        form: name of the form of the method.
        weights: the other settings.
        scales: of every layer, now; empty if they are not known, as in the state of an earlier version.
        history: the allocations so far.
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
        """The state without the layers' names as a 1-D int64 tensor on the CPU."""
        plan = self.schedule
        leader = -1 if self.leader is None else self.leader
        whole = [_LAYOUT, self.step, self.fixed, self.automatic, leader]
        whole += [plan.tinit, plan.tfinal, plan.total_step, plan.deltaT] if plan else [0] * 4
        bits = torch.tensor([float(value) for value in vars(self.weights).values()], dtype=torch.float64)
        head = torch.tensor([*whole, _packed_rank(self.target_r), _FORMS.index(self.form)], dtype=torch.int64)
        scales = torch.tensor(self.scales, dtype=torch.float64).view(torch.int64)
        count = torch.tensor([len(scales)], dtype=torch.int64)
        return torch.cat([head, bits.view(torch.int64), count, scales, self.history.to_tensor()])

    @classmethod
    def from_tensor(cls, layers: Sequence[str], packed: Tensor) -> RunState:
        """Unpack what `to_tensor` packed, for a run whose blocks are called ``layers``.

        Raises:
            ValueError: it is no such tensor, or not of so many layers; or its numbers make no sense.

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
        """See that a run which stands ``here`` may go on from this state.

        Args:
            here: the run that is to go on.
            schedule: its schedule, with the length of this state's run where it has none yet; None: nothing is pruned.

        Raises:
            ValueError: they are different runs.
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
                f"here the adapter has {', '.join(f'{name}={now[name]}' for name in differing)}. A run goes on "
                "only with the configuration that it began with."
            )


# The average rank in the end is mostly whole. Any other lies in the packed tensor as the bits of a float, with the sign
# turned, so that it is less than 0 and can be told from a whole one.


def _packed_rank(rank: float) -> int:
    if rank == int(rank):
        return int(rank)
    return -int(torch.tensor([rank], dtype=torch.float64).view(torch.int64))


def _rank(packed: int) -> float:
    return packed if packed > 0 else float(torch.tensor([-packed], dtype=torch.int64).view(torch.float64))
