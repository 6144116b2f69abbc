"""What the integrations share: finding the adapted model in what a trainer holds, and what they log of it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from rankwise.method.schedule import Phase
from rankwise.model import PeftModel

_PHASE_NUMBERS = {str(phase): number for number, phase in enumerate(Phase)}


def adapted_model(model: Any) -> PeftModel | None:
    """The adapted model: ``model`` itself, or the first in it; None if there is none.

    It may be inside a wrapper such as DistributedDataParallel, or be a part of the model that is trained, as the
    encoder of a SentenceTransformer is.
    """
    if not isinstance(model, nn.Module):
        return None
    return next((module for module in model.modules() if isinstance(module, PeftModel)), None)


def fit_total_step(adapted: PeftModel, steps: int, who: str) -> None:
    """Set ``total_step`` where it was left out; warn where it is not the number of ``steps`` that ``who`` runs."""
    where = adapted.allocation_state
    if where is None:
        return
    if where.total_step is None:
        adapted.set_total_step(steps)
    elif where.total_step != steps:
        warnings.warn(
            f"The schedule is made for total_step={where.total_step}, but this {who} runs {steps} optimizer steps. "
            "Leave `total_step` out of AdaLoraConfig to have it fitted.",
            stacklevel=3,
        )


def rank_metrics(adapted: PeftModel) -> dict[str, float]:
    """Where the ranks are, for a log; empty if no AdaLoRA adapter trains.

    ``budget`` and ``total_rank`` (triplets), ``rank_phase`` (0 warm-up, 1 pruning, 2 final) and ``orth_penalty``
    (without its weight).
    """
    where = adapted.allocation_state
    if where is None:
        return {}
    return {
        "budget": where.budget,
        "total_rank": adapted.rank_summary().total_rank,
        "rank_phase": _PHASE_NUMBERS[where.phase],
        "orth_penalty": round(float(adapted.orthogonal_penalty()), 6),
    }


def tell_if_unfinished(adapted: PeftModel | None) -> None:
    """Warn if the run, which has ended, has not brought the budget down to its target."""
    if adapted is not None and adapted._rankwise_controller is not None:
        adapted._rankwise_controller.tell_if_unfinished()
