"""The allocation: it takes scores and a budget, and returns which triplets stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def allocate(
    scores: Tensor, budget: int, tie_order: Tensor | None = None, costs: Tensor | None = None
) -> Tensor:
    """Keep the ``budget`` triplets with the highest scores (Zhang et al., 2023, equation 6).

    The budget is met exactly. Equal scores are taken in the order of ``tie_order``, and NaN counts as the lowest score.
    With ``costs``, triplets are taken best first, and any that would exceed the budget is skipped.

    Args:
        scores: one score per triplet over all layers, (triplets,), floating point.
        budget: number of triplets that stay, in [0, triplets]; with ``costs``, the most that they may cost.
        tie_order: all triplet numbers, (triplets,), int64. Among equal scores the first in it wins. None: 0, 1, 2, …
        costs: cost of each triplet, (triplets,), int64, in the unit of ``budget``. None: each costs 1.

    Returns:
        A mask, (triplets,), bool: True for a triplet that stays.

    Raises:
        ValueError: ``budget`` is out of range and ``costs`` is None.

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
    # Each round ends at a triplet whose cost exceeds what is left. So each round rules out one more distinct cost.
    for _ in range(len(costs.unique())):
        left = budget - (ordered * taken).sum()
        fits = ~taken & (ordered <= left)
        taken |= fits & ((ordered * fits).cumsum(0) <= left)
    return kept.index_copy_(0, best, taken)


@dataclass(frozen=True)
class Budget:
    """The limit of a cut: how much may stay.

    Args:
        ranks: number of ranks of average size.
        parameters: number of parameters of A and B. None: the budget counts ranks alone.
    """

    ranks: int
    parameters: int | None = None


def budget_with_reserved(
    budget: Budget, share: int, initial: int, reserved: Tensor, held: Tensor, costs: Tensor | None
) -> Budget:
    """The budget of all layers, where some layers keep their ranks and the others share a budget of their own.

    Args:
        budget: the budget of a cut over all layers, which the result replaces.
        share: number of ranks that the other layers may keep.
        initial: number of ranks that the other layers had at the start.
        reserved: True for each rank of a layer that keeps its ranks, (ranks,), bool.
        held: True for each of these ranks that is on, (ranks,), bool.
        costs: parameters of each rank, (ranks,), int64. None: each rank costs 1.

    Example:
        >>> reserved, held = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False])
        >>> budget_with_reserved(Budget(2), 1, 2, reserved, held, None)
        Budget(ranks=2, parameters=None)
    """
    ranks = share + int(held.sum())
    if costs is None:
        return Budget(ranks)
    own = int(costs.masked_fill(reserved, 0).sum()) * share // max(initial, 1)
    return Budget(ranks, own + int((costs * held).sum()))


def choose(
    scores: Tensor,
    acts: Tensor,
    budget: Budget,
    tie_order: Tensor,
    costs: Tensor | None = None,
    reserved: Tensor | None = None,
    held: Tensor | None = None,
    unreached: Tensor | None = None,
) -> Tensor:
    """Choose the ranks that a cut keeps.

    Args:
        scores: score of each rank, (ranks,), floating point, higher is better.
        acts: True for a rank that may stay, (ranks,), bool.
        budget: the most that the kept ranks may cost.
        tie_order: all rank numbers, (ranks,), int64. Among equal scores the first in it wins.
        costs: parameters of each rank, (ranks,), int64. None: each rank costs 1.
        reserved: True for each rank of a layer that keeps its ranks, (ranks,), bool.
        held: True for each of these ranks that is on, (ranks,), bool.
        unreached: True for a rank whose update is exactly 0 so far, (ranks,), bool. Such ranks come last.

    Returns:
        A mask, (ranks,), bool: True for a rank that stays.

    Example:
        >>> acts, order = torch.tensor([True, True, True, False]), torch.arange(4)
        >>> choose(torch.tensor([1.0, 3.0, 2.0, 9.0]), acts, Budget(2), order)
        tensor([False,  True,  True, False])
    """
    scores = scores.masked_fill(~acts, -torch.inf)
    if unreached is not None:
        scores = scores.masked_fill(unreached, -torch.inf)
    if reserved is not None and held is not None:
        finite = torch.finfo(scores.dtype)
        scores = scores.nan_to_num(nan=finite.min, posinf=finite.max)
        scores = scores.masked_fill(reserved, -torch.inf).masked_fill(held, torch.inf)
    allowance = budget.ranks if budget.parameters is None else budget.parameters
    return allocate(scores, allowance, tie_order, costs) & acts
