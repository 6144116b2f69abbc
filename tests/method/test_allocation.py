"""The triplets that stay: the best ones, exactly as many as the budget allows, in a fixed order if scores are equal."""

from __future__ import annotations

import math
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from cases import random_cases, seeds
from rankwise.method.allocation import allocate
from rankwise.method.layout import TripletLayout

# Real scores are tiny and often equal. In the worst case they are any float.
any_scores = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-30, 1.0, 2.0, math.inf, -math.inf, math.nan]),
    st.floats(width=32),
)
shares = st.floats(0, 0.95)
prices = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=12)


def test_the_highest_scores_stay() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    assert allocate(scores, 2).tolist() == [True, False, True, False]
    assert not allocate(scores, 0).any() and allocate(scores, 4).all()


def test_equals_are_taken_in_the_order_given() -> None:
    scores, order = torch.ones(4, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    assert allocate(scores, 2, order).tolist() == [True, False, True, False]
    assert allocate(scores, 2).tolist() == [True, True, False, False]


def test_nan_is_the_lowest_score_and_infinity_the_highest() -> None:
    scores = torch.tensor([math.nan, -1e300, math.inf, 0.0], dtype=torch.float64)
    assert allocate(scores, 1).tolist() == [False, False, True, False]
    assert allocate(scores, 3).tolist() == [False, True, True, True]


@random_cases(200)
@given(prices, st.integers(0, 80))
def test_with_costs_each_stays_best_first_if_it_can_still_be_paid(
    priced: list[tuple[int, int]], budget: int
) -> None:
    scores, costs = (torch.tensor(column) for column in zip(*priced, strict=True))
    kept = allocate(scores.double(), budget, costs=costs)
    best_first = sorted(range(len(priced)), key=lambda number: -priced[number][0])
    paid, expected = 0, set()
    for number in best_first:
        if paid + priced[number][1] <= budget:
            paid += priced[number][1]
            expected.add(number)
    assert set(kept.nonzero().flatten().tolist()) == expected
    assert int(costs[kept].sum()) <= budget


@pytest.mark.parametrize("budget", [-1, 4])
def test_a_budget_that_no_choice_meets_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match=rf"`budget` must be in \[0, 3\].* but is {budget}"):
        allocate(torch.zeros(3), budget)


def allocate_by_sorting(values: list[float], budget: int, order: list[int]) -> list[bool]:
    lowest_if_nan = [-math.inf if math.isnan(value) else value for value in values]
    place = {triplet: number for number, triplet in enumerate(order)}
    best = sorted(range(len(values)), key=lambda t: (-lowest_if_nan[t], place[t]))[:budget]
    return [triplet in best for triplet in range(len(values))]


@random_cases(300)
@given(st.lists(any_scores, min_size=1, max_size=30), shares, seeds)
def test_the_budget_is_met_exactly_by_the_best_whatever_the_scores(
    values: list[float], share: float, seed: int
) -> None:
    budget = round(share / 0.95 * len(values))
    order = random.Random(seed).sample(range(len(values)), len(values))
    kept = allocate(torch.tensor(values), budget, torch.tensor(order))
    assert int(kept.sum()) == budget
    assert kept.tolist() == allocate_by_sorting(torch.tensor(values).tolist(), budget, order)
    assert torch.equal(kept, allocate(torch.tensor(values), budget, torch.tensor(order)))


@random_cases(200)
@given(st.lists(any_scores, min_size=1, max_size=20))
def test_a_larger_budget_keeps_everything_that_a_smaller_one_keeps(values: list[float]) -> None:
    tensor = torch.tensor(values)
    kept = [allocate(tensor, budget) for budget in range(len(values) + 1)]
    for smaller, greater in zip(kept, kept[1:], strict=False):
        assert bool((smaller <= greater).all())


@random_cases(300)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=8), st.floats(0, 1))
def test_equal_scores_share_the_budget_evenly_between_the_layers(ranks: list[int], share: float) -> None:
    layout = TripletLayout(tuple(ranks), (3,) * len(ranks), (2,) * len(ranks))
    budget = round(share * layout.triplets)
    kept = allocate(torch.zeros(layout.triplets), budget, torch.tensor(layout.round_robin()))
    held = [int(part.sum()) for part in kept.split(ranks)]
    full = [rank for rank, initial in zip(held, ranks, strict=True) if rank == initial]
    others = [rank for rank, initial in zip(held, ranks, strict=True) if rank < initial]
    assert sum(held) == budget
    assert not others or (max(others) - min(others) <= 1 and max(full, default=0) <= max(others) + 1)
