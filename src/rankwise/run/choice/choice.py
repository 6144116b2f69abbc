"""The interface for choosing ranks: what is observed in a step, and what follows at a cut. Each form implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

from rankwise.parallel.holder import Step
from rankwise.run.gradient_checks import GradientChecks


class Candidates(NamedTuple):
    """The ranks that a cut chooses from.

    Args:
        scores: the score of each rank, (ranks,); a higher one is better.
        acts: the ranks that may stay, (ranks,), bool.
        unchanged: the indices of layers that keep their ranks, in addition to those that don't train.
    """

    scores: Tensor
    acts: Tensor
    unchanged: Sequence[int] = ()


class Choice(Protocol):
    """A way to choose ranks."""

    checks: GradientChecks
    counts_parameters: ClassVar[
        bool
    ]  # a rank's cost is its number of parameters in A and B; otherwise it is 1
    entries: int  # the length of each of the run's statistics

    def observe(self, step: Step, number: int) -> None:
        """Observe the gradients of a step, which is the run's step ``number``."""

    def candidates(self) -> Candidates:
        """The ranks to choose from now. All processes must call it together."""

    def apply(
        self, mask: Tensor, unchanged: Sequence[bool], final: bool, optimizers: Sequence[Optimizer]
    ) -> None:
        """Keep the ranks in ``mask``, and switch off the others. Must follow a call of `candidates`.

        Args:
            mask: the ranks to keep, (ranks,), bool.
            unchanged: for each layer, whether it stays as it is.
            final: whether the budget has reached its target.
            optimizers: the optimizers that may train any of the factors.
        """

    def restore(self, scales: Sequence[float]) -> None:
        """Continue a run whose tensors are loaded and whose layers had these ``scales``; empty if unknown."""

    def rank_importance(self) -> Tensor:
        """The worth of each kept rank, (ranks,); 0 for the others."""
