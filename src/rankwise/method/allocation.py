"""The allocation: scores and a budget in, the triplets that stay out."""

from __future__ import annotations

import torch
from torch import Tensor


def allocate(
    scores: Tensor, budget: int, tie_order: Tensor | None = None, costs: Tensor | None = None
) -> Tensor:
    """Keep the ``budget`` triplets with the highest scores (Zhang et al., 2023, equation 6).

    The budget is met exactly: equal scores are taken in the order given, and NaN counts as the lowest score. With
    ``costs`` each is kept, best first, if with it all that are kept cost no more than the budget.

    Args:
        scores: one score per triplet over all layers, (triplets,), floating point.
        budget: how many triplets stay, in [0, triplets].
        tie_order: all triplet numbers, (triplets,), int64, the one to prefer among equals first. None: 0, 1, 2, …
        costs: what each triplet costs, (triplets,), int64, in the unit of ``budget``; None: one each.

    Returns:
        (triplets,), bool: True for a triplet that stays.

    Raises:
        ValueError: ``budget`` is out of range.

    Example:
        >>> allocate(torch.tensor([0.1, 0.4, 0.4, 0.4]), budget=2)
        tensor([False,  True,  True, False])
        >>> allocate(torch.tensor([0.1, 0.4, 0.3, 0.2]), budget=6, costs=torch.tensor([2, 2, 3, 2]))
        tensor([False,  True,  True, False])
    """
    if costs is None and not 0 <= budget <= scores.numel():
        raise ValueError(
            f"`budget` must be in [0, {scores.numel()}], the number of triplets, but is {budget}."
        )
    comparable = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if tie_order is not None:
        comparable = comparable[tie_order]
    best = torch.argsort(comparable, descending=True, stable=True)
    if tie_order is not None:
        best = tie_order[best]
    kept = torch.zeros_like(scores, dtype=torch.bool)
    if costs is None:
        kept[best[:budget]] = True
        return kept
    ordered = costs[best]
    taken = torch.zeros_like(kept)
    # A round ends at what costs more than it has left, so after each of them another cost is out of the question.
    for _ in range(len(costs.unique())):
        left = budget - (ordered * taken).sum()
        fits = ~taken & (ordered <= left)
        taken |= fits & ((ordered * fits).cumsum(0) <= left)
    return kept.index_copy_(0, best, taken)
