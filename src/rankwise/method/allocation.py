"""The allocation: from scores and a budget to the triplets that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def allocate(
    scores: Tensor, budget: int, tie_order: Tensor | None = None, costs: Tensor | None = None
) -> Tensor:
    """Keep the ``budget`` triplets with the highest scores (Zhang et al., 2023, equation 6).

    The budget is met exactly. Equal scores are taken in the order given, and NaN counts as the lowest score. With
    ``costs``, triplets are taken best first, and any that would exceed the budget is skipped.

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


@dataclass(frozen=True)
class Budget:
    """What a cut may keep.

    Args:
        ranks: how many ranks of average size.
        parameters: as many numbers in A and B, where ranks are weighed by them; None: each rank counts as one.
    """

    ranks: int
    parameters: int | None = None


def budget_with_reserved(
    budget: Budget, share: int, initial: int, reserved: Tensor, held: Tensor, costs: Tensor | None
) -> Budget:
    """The budget where some layers keep the ranks that they have, and the others share a budget of their own.

    Args:
        budget: what it would be if all layers shared one.
        share: how many ranks the others may keep.
        initial: how many ranks the others had at the start.
        reserved: (ranks,), bool: the ranks of the layers that keep theirs.
        held: (ranks,), bool: those of them that are kept.
        costs: the parameters of each rank, (ranks,), int64; None: each counts as one.

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
    """The ranks that a cut keeps, (ranks,), bool.

    Args:
        scores: (ranks,), floating point, the higher the better.
        acts: (ranks,), bool: those that may stay.
        budget: what they may cost.
        tie_order: all ranks, (ranks,), int64; among equal scores, the first here is kept.
        costs: the parameters of each rank, (ranks,), int64; None: each counts as one.
        reserved: (ranks,), bool: ranks of layers that keep what they have.
        held: (ranks,), bool: what these have.
        unreached: (ranks,), bool: ranks that add exactly 0 so far; they come last.

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
