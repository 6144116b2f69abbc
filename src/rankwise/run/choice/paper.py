"""The paper's choice: triplets are scored by weight times gradient, and those with low scores are switched off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.method.importance import Importance
from rankwise.method.scores import update_scores
from rankwise.parallel.holder import Step
from rankwise.run.choice.choice import Candidates
from rankwise.run.factors import Factors
from rankwise.run.gradient_checks import GradientChecks


class PaperChoice:
    """Keeps running averages of the paper's scores, and sets E to 0 in triplets that are switched off.

    A triplet that is off still gets a gradient, so a later cut may switch it on again.

    Args:
        factors: the factors of the run, including E.
        importance: the quantity that is scored.
        betas: ``beta1`` and ``beta2``.
        warn: a function that gives each warning once.
    """

    counts_parameters: ClassVar[bool] = False

    def __init__(
        self,
        factors: Factors,
        importance: Importance,
        betas: tuple[float, float],
        warn: Callable[[str], None],
    ) -> None:
        self._factors, self._importance, self._betas = factors, importance, betas
        self.checks = GradientChecks(factors, importance.decisive, warn)
        self.entries = importance.entries

    def observe(self, step: Step, number: int) -> None:
        measured = [n for key in self._importance.factors for n in self._factors.numbers(key)]
        if not self.checks.has_gradients(step, measured):
            return
        tensors = self._factors.tensors
        sensitivity, uncertainty = tensors.get("sensitivity"), tensors.get("uncertainty")
        importance, known = self._importance.measure(step.products(measured), sensitivity.device)
        finite = update_scores(sensitivity, uncertainty, importance, *self._betas, known)
        self.checks.count(finite, number)

    def candidates(self) -> Candidates:
        return Candidates(self._scores(), torch.ones_like(self._factors.mask))

    def apply(
        self, mask: Tensor, unchanged: Sequence[bool], final: bool, optimizers: Sequence[Optimizer]
    ) -> None:
        gates = torch.cat([rows.to(mask.device) for rows in self._factors.rows("E")])
        parts = torch.where(mask[:, None], gates, 0.0).split(self._factors.layout.ranks)
        self._factors.write_rows("E", dict(enumerate(parts)))

    def keep_off(self, moves_zeros: bool) -> None:
        """Ranks that are off have E = 0 here, and may come back."""

    def restore(self, scales: Sequence[float]) -> None:
        """Do nothing: the scale never changes."""

    def rank_importance(self) -> Tensor:
        return self._scores() * self._factors.mask

    def _scores(self) -> Tensor:
        tensors = self._factors.tensors
        return self._importance.per_triplet(tensors.get("sensitivity"), tensors.get("uncertainty"))
