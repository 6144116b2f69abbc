"""The positions of triplets in flat vectors: sums and means there equal those of plain loops, for any shapes."""

from __future__ import annotations

import random

import torch
from hypothesis import given

from cases import random_cases, random_factors, random_layout, seeds
from rankwise.method.layout import TripletLayout

CPU = torch.device("cpu")


def test_elements_lie_as_all_A_then_all_E_then_all_B() -> None:
    layout = TripletLayout(ranks=(2, 1), widths_in=(3, 2), widths_out=(1, 4))
    assert (layout.triplets, layout.elements) == (3, (6 + 2) + (2 + 1) + (2 + 4))
    start_of_E, start_of_B = 6 + 2, 6 + 2 + 2 + 1
    for place, triplet in ((0, 0), (3, 1), (6, 2), (start_of_E, 0), (start_of_E + 2, 2), (start_of_B + 1, 1)):
        one = torch.zeros(layout.elements, dtype=torch.float64)
        one[place] = 1
        assert layout.mean_per_triplet(one).nonzero().flatten().tolist() == [triplet]


@random_cases(100)
@given(seeds)
def test_the_mean_of_a_triplet_is_that_of_its_row_its_gate_and_its_column(seed: int) -> None:
    torch.manual_seed(seed)
    layout = random_layout(random.Random(seed))
    factors = [matrix.double() for matrix in random_factors(layout, 1.0)]
    count = len(layout.ranks)
    expected = [
        a[i].mean() + e[i, 0] + b[:, i].mean()
        for a, e, b in zip(factors[:count], factors[count : 2 * count], factors[2 * count :], strict=True)
        for i in range(len(a))
    ]
    flat = torch.cat([matrix.flatten() for matrix in factors])
    torch.testing.assert_close(layout.mean_per_triplet(flat), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_a_triplet_costs_its_numbers_in_A_and_B() -> None:
    layout = TripletLayout(ranks=(2, 0, 1), widths_in=(3, 9, 5), widths_out=(4, 9, 1))
    assert layout.costs == [7, 7, 6]
    assert layout.parameters_per_rank(CPU).tolist() == [7, 7, 6]


def test_equals_are_taken_from_every_layer_in_turn() -> None:
    layout = TripletLayout(ranks=(3, 1, 2), widths_in=(1, 1, 1), widths_out=(1, 1, 1))
    assert layout.round_robin() == [0, 3, 4, 1, 5, 2]
