"""From the gradients of each step to the scores of triplets, in a form that scores weight times gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.method.importance import Importance
from rankwise.method.scores import update_scores
from rankwise.parallel.sharded import gather
from rankwise.parallel.zero import ZeroParts
from rankwise.run.triplets import Triplets
from rankwise.run.watch import Watch


class Scoring(Watch):
    """Keeps the running averages of what the paper's form scores.

    Args:
        triplets: the adapter's.
        importance: what is scored.
        betas: ``beta1`` and ``beta2``.
        tell: says something to the user, once.
    """

    def __init__(
        self,
        triplets: Triplets,
        importance: Importance,
        betas: tuple[float, float],
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(triplets, tell)
        self.importance, self.betas = importance, betas
        self.decisive, self.entries = importance.decisive, importance.entries

    def per_triplet(self) -> Tensor:
        """One score for each triplet, (triplets,)."""
        triplets = self._triplets
        return self.importance.per_triplet(triplets.buffer("sensitivity"), triplets.buffer("uncertainty"))

    def update(self, step: int) -> None:
        factors = [p for key in self.importance.factors for p in self._triplets.factors(key)]
        gradients = self._gradients(factors)
        if all(gradient is None for gradient in gradients):
            return
        weights = [p.detach() for p in factors]
        filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
        if any(weight.element_size() < 4 for weight in weights):
            weights, filled = [w.float() for w in weights], [g.float() for g in filled]
        products = gather(torch._foreach_mul(weights, filled))
        known = [None if g is None else product for g, product in zip(gradients, products, strict=True)]
        self._move(known, step)

    def update_from_parts(
        self, parts: ZeroParts, held: frozenset[int], optimizer: Optimizer, step: int
    ) -> None:
        measured = [n for key in self.importance.factors for n in self._triplets.numbers(key)]
        numbers = [number for number in measured if number in held]
        pieces = parts.pieces(optimizer)
        products = parts.gathered(numbers, pieces, lambda piece: piece.master * piece.gradient)
        known = dict(zip(numbers, products, strict=True))
        self._move([known.get(number) for number in measured], step)

    def _move(self, products: list[Tensor | None], step: int) -> None:
        """Move the averages on by weight times gradient of all that is measured; None where there is no gradient."""
        sensitivity, uncertainty = (self._triplets.buffer(name) for name in ("sensitivity", "uncertainty"))
        importance, known = self.importance.measure(products, sensitivity.device)
        self._count(update_scores(sensitivity, uncertainty, importance, *self.betas, known), step)
