"""Functions that the integrations share: they find the adapted model in a trainer, and collect metrics for its logs."""

from __future__ import annotations

import warnings
from typing import Any, Protocol, cast

from torch import nn

from rankwise.adapt.ranks import HANDLES, AdaptiveRanks
from rankwise.method.schedule import Phase
from rankwise.run.controller import Controller
from rankwise.run.state import AllocationState
from rankwise.run.summary import RankSummary

_PHASE_NUMBERS = {str(phase): number for number, phase in enumerate(Phase)}


class Run(Protocol):
    """The interface of a run for integrations. Adapted models and the handle of `adapt_ranks` have it."""

    @property
    def _rankwise_controller(self) -> Controller | None: ...

    @property
    def allocation_state(self) -> AllocationState | None:
        """Step, phase and budget of the run. None if no ranks adapt."""

    def set_total_step(self, total_step: int) -> None:
        """Set the number of optimizer steps of the run."""

    def rank_summary(self) -> RankSummary:
        """Rank, importance and parameters of every adapted layer."""


def run_of(model: Any) -> Run | None:
    """Find the run in ``model``: the first adapted model, which may be ``model`` itself, or a handle that it keeps.

    The adapted model may be inside a wrapper such as DistributedDataParallel. It may also be a part of the model, such
    as the encoder of a SentenceTransformer. If a PEFT model has had runs on several adapters, the one that trains now
    is found, or else the last one.
    """
    if not isinstance(model, nn.Module):
        return None
    for module in model.modules():
        # This asks the class, because wrappers pass on attributes of the model inside them.
        if hasattr(type(module), "allocation_state"):
            return cast("Run", module)
        handles = vars(module).get(HANDLES)
        if handles:
            runs: list[AdaptiveRanks] = list(handles.values())
            under_way = [each for each in runs if not each.is_over]
            return cast("Run", ([each for each in under_way if each._trains] or under_way or runs)[-1])
    return None


def own_model(model: Any) -> Any:
    """The model with rankwise's own layers: ``model`` itself, or the first inside it. None if there is none."""
    if not isinstance(model, nn.Module):
        return None
    return next((module for module in model.modules() if hasattr(type(module), "allocation_state")), None)


def fit_total_step(run: Run, steps: int, who: str) -> None:
    """Set ``total_step`` to ``steps`` if it was left out. Warn if it differs from the ``steps`` that ``who`` runs.

    A resumed run has the ``total_step`` of its checkpoint.
    """
    where = run.allocation_state
    if where is None:
        return
    if where.total_step is None:
        run.set_total_step(steps)
    elif where.total_step != steps:
        begun = f"The run is at step {where.step} and keeps the schedule that it began with."
        warnings.warn(
            f"The schedule is made for total_step={where.total_step}, but this {who} runs {steps} optimizer steps. "
            f"{begun if where.step else 'Leave `total_step` out to have it fitted.'}",
            stacklevel=3,
        )


def rank_metrics(run: Run) -> dict[str, float]:
    """Collect the metrics of a run for a log. Without adaptive ranks there are none.

    They are ``budget`` and ``total_rank`` in ranks, and ``rank_phase`` (0 warm-up, 1 pruning, 2 final). A run with an
    orthogonality penalty also has ``orth_penalty``, the penalty without its weight.
    """
    where, controller = run.allocation_state, run._rankwise_controller
    if where is None or controller is None:
        return {}
    metrics: dict[str, float] = {
        "budget": where.budget,
        # `rank_summary` would read all factors to compute each layer's worth.
        "total_rank": sum(controller.allocated_ranks().values()),
        "rank_phase": _PHASE_NUMBERS[where.phase],
    }
    if controller.config.orth_reg_weight:
        metrics["orth_penalty"] = round(float(controller.penalty()), 6)
    return metrics


def warn_if_unfinished(run: Run | None) -> None:
    """Warn if a run has ended before the budget reached its target."""
    if run is not None and run._rankwise_controller is not None:
        run._rankwise_controller.warn_if_unfinished()
