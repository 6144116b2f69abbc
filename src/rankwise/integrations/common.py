"""What the integrations share: finding the adapted model in what a trainer holds, and what they log of it."""

from __future__ import annotations

import warnings
from typing import Any, Protocol, cast

from torch import nn

from rankwise.adapt.ranks import HANDLES
from rankwise.method.schedule import Phase
from rankwise.run.controller import Controller
from rankwise.run.state import AllocationState
from rankwise.run.summary import RankSummary

_PHASE_NUMBERS = {str(phase): number for number, phase in enumerate(Phase)}


class Run(Protocol):
    """What an integration uses of a run: rankwise's adapted models have it, and the handle of `adapt_ranks`."""

    @property
    def _rankwise_controller(self) -> Controller | None: ...

    @property
    def allocation_state(self) -> AllocationState | None:
        """Where the ranks' allocation stands; None where no ranks adapt."""

    def set_total_step(self, total_step: int) -> None:
        """Tell the schedule how many optimizer steps the run has."""

    def rank_summary(self) -> RankSummary:
        """Rank, importance and parameters of every adapted layer."""


def run_of(model: Any) -> Run | None:
    """The run in ``model``: an adapted model, itself or the first in it, or the handle that a model keeps.

    It may be inside a wrapper such as DistributedDataParallel, or belong to a part of the model that is trained, as the
    encoder of a SentenceTransformer is.
    """
    if not isinstance(model, nn.Module):
        return None
    for module in model.modules():
        # The class is asked, as wrappers pass on what an object is asked for.
        if hasattr(type(module), "allocation_state"):
            return cast("Run", module)
        handles = vars(module).get(HANDLES)
        if handles:
            return cast("Run", next(iter(handles.values())))
    return None


def own_model(model: Any) -> Any:
    """The model with rankwise's own layers: ``model`` itself, or the first in it; None if there is none."""
    if not isinstance(model, nn.Module):
        return None
    return next((module for module in model.modules() if hasattr(type(module), "allocation_state")), None)


def fit_total_step(run: Run, steps: int, who: str) -> None:
    """Set ``total_step`` where it was left out; warn where it is not the number of ``steps`` that ``who`` runs."""
    where = run.allocation_state
    if where is None:
        return
    if where.total_step is None:
        run.set_total_step(steps)
    elif where.total_step != steps:
        warnings.warn(
            f"The schedule is made for total_step={where.total_step}, but this {who} runs {steps} optimizer steps. "
            "Leave `total_step` out to have it fitted.",
            stacklevel=3,
        )


def rank_metrics(run: Run) -> dict[str, float]:
    """Where the ranks are, for a log; empty if no ranks adapt.

    ``budget`` and ``total_rank`` (triplets), ``rank_phase`` (0 warm-up, 1 pruning, 2 final), and where there is an
    orthogonality penalty ``orth_penalty`` (without its weight).
    """
    where, controller = run.allocation_state, run._rankwise_controller
    if where is None or controller is None:
        return {}
    metrics: dict[str, float] = {
        "budget": where.budget,
        # Not from `rank_summary`, which looks at all factors to say what layers are worth.
        "total_rank": sum(controller.allocated_ranks().values()),
        "rank_phase": _PHASE_NUMBERS[where.phase],
    }
    if controller.config.orth_reg_weight:
        metrics["orth_penalty"] = round(float(controller.penalty()), 6)
    return metrics


def warn_if_unfinished(run: Run | None) -> None:
    """Warn if the run, which has ended, has not brought the budget down to its target."""
    if run is not None and run._rankwise_controller is not None:
        run._rankwise_controller.warn_if_unfinished()
