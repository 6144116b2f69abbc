"""The protocol of a way to choose ranks: it observes each step, and proposes and applies each cut."""

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
        scores: score of each rank, (ranks,), floating point, higher is better.
        acts: True for a rank that may stay, (ranks,), bool.
        unchanged: numbers of layers that keep their ranks, in addition to the layers that do not train.
    """

    scores: Tensor
    acts: Tensor
    unchanged: Sequence[int] = ()


class Choice(Protocol):
    """A way to choose ranks. Each form of the method has one."""

    checks: GradientChecks
    counts_parameters: ClassVar[bool]  # True: a rank costs its parameters of A and B; False: a rank costs 1
    entries: int  # number of entries of each of the run's statistics

    def observe(self, step: Step, number: int) -> None:
        """Observe the gradients of a step, which is step ``number`` of the run."""

    def candidates(self) -> Candidates:
        """Return the ranks to choose from now. All processes must call it together."""

    def apply(
        self, mask: Tensor, unchanged: Sequence[bool], final: bool, optimizers: Sequence[Optimizer]
    ) -> None:
        """Keep the ranks in ``mask`` and cut the others. Call `candidates` first.

        Args:
            mask: True for a rank that stays, (ranks,), bool.
            unchanged: for each layer, whether it stays as it is.
            final: whether the budget has reached its target.
            optimizers: optimizers that may train any of the factors.
        """

    def restore(self, scales: Sequence[float]) -> None:
        """Continue a run whose tensors are loaded and whose layers had these ``scales``. Empty: they are unknown."""

    def rank_importance(self) -> Tensor:
        """The worth of each rank that is kept, (ranks,). It is 0 for the others."""
