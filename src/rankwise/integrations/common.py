"""What the integrations share: finding the adapted model in what a trainer holds, and what they log of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import Tensor, nn

from rankwise.method.schedule import Phase
from rankwise.run.controller import Controller
from rankwise.run.state import AllocationState
from rankwise.run.summary import RankSummary

_PHASE_NUMBERS = {str(phase): number for number, phase in enumerate(Phase)}


class AdaptedModel(Protocol):
    """What an integration uses of a `rankwise.PeftModel`, which itself calls integrations."""

    _rankwise_controller: Controller | None

    @property
    def peft_config(self) -> Mapping[str, Any]:
        """The adapters' configurations by name."""

    @property
    def allocation_state(self) -> AllocationState | None:
        """Where the ranks' allocation stands; None where no AdaLoRA adapter trains."""

    def set_total_step(self, total_step: int) -> None:
        """Tell the schedule how many optimizer steps the run has."""

    def rank_summary(self) -> RankSummary:
        """Rank, importance and parameters of every adapted layer."""

    def orthogonal_penalty(self) -> Tensor:
        """The penalty without its weight, a 0-dim tensor."""

    def load_checkpoint(self, folder: str, adapter_name: str | None = None) -> None:
        """Bring the adapters to what a folder holds."""


def adapted_model(model: Any) -> AdaptedModel | None:
    """The adapted model: ``model`` itself, or the first in it; None if there is none.

    It may be inside a wrapper such as DistributedDataParallel, or be a part of the model that is trained, as the
    encoder of a SentenceTransformer is.
    """
    if not isinstance(model, nn.Module):
        return None
    # The class is asked, as wrappers pass on what an object is asked for.
    adapted = (module for module in model.modules() if hasattr(type(module), "allocation_state"))
    return cast("AdaptedModel | None", next(adapted, None))


def fit_total_step(adapted: AdaptedModel, steps: int, who: str) -> None:
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


def rank_metrics(adapted: AdaptedModel) -> dict[str, float]:
    """Where the ranks are, for a log; empty if no AdaLoRA adapter trains.

    ``budget`` and ``total_rank`` (triplets), ``rank_phase`` (0 warm-up, 1 pruning, 2 final); and ``orth_penalty``
    (without its weight) where there is a penalty.
    """
    where, controller = adapted.allocation_state, adapted._rankwise_controller
    if where is None or controller is None:
        return {}
    return {
        "budget": where.budget,
        # Not from `rank_summary`, which looks at all factors to say what layers are worth.
        "total_rank": sum(controller.allocated_ranks().values()),
        "rank_phase": _PHASE_NUMBERS[where.phase],
        **(
            {"orth_penalty": round(float(adapted.orthogonal_penalty()), 6)}
            if controller.config.orth_reg_weight
            else {}
        ),
    }


def tell_if_unfinished(adapted: AdaptedModel | None) -> None:
    """Warn if the run, which has ended, has not brought the budget down to its target."""
    if adapted is not None and adapted._rankwise_controller is not None:
        adapted._rankwise_controller.tell_if_unfinished()
