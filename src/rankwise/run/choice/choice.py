"""How ranks are chosen: what is observed in a step, and what follows at a cut. One implementation for each form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

from rankwise.parallel.holder import Step
from rankwise.run.gradient_checks import GradientChecks


class Candidates(NamedTuple):
    """What a cut chooses from.

    Args:
        scores: (ranks,), the higher the better.
        acts: (ranks,), bool: those that may stay.
        unchanged: numbers of layers that keep the ranks that they have, beside those that don't train.
    """

    scores: Tensor
    acts: Tensor
    unchanged: Sequence[int] = ()


class Choice(Protocol):
    """A way to choose ranks."""

    checks: GradientChecks
    counts_parameters: ClassVar[bool]  # a rank costs its numbers in A and B; else one
    entries: int  # of each of the run's statistics

    def observe(self, step: Step, number: int) -> None:
        """Take in the gradients of a step, which is the run's step ``number``."""

    def candidates(self) -> Candidates:
        """What to choose from now; all processes call it together."""

    def apply(
        self, mask: Tensor, unchanged: Sequence[bool], final: bool, optimizers: Sequence[Optimizer]
    ) -> None:
        """Keep the ranks in ``mask``, (ranks,), bool, and switch off the others. Follows `candidates`.

        Args:
            mask: the choice.
            unchanged: which layers stay as they are.
            final: the budget has reached its target.
            optimizers: those that may train any of the factors.
        """

    def keep_off(self, moves_zeros: bool) -> None:
        """An optimizer has stepped after a cut: switch ranks off again that it has moved.

        Args:
            moves_zeros: it is known to move what has no gradient.
        """

    def restore(self, scales: Sequence[float]) -> None:
        """Take up a run whose layers had these ``scales``, and whose tensors are loaded; empty: they are not known."""

    def rank_importance(self) -> Tensor:
        """What each rank that is kept is worth, (ranks,); 0 for the others."""
