"""The worth of a direction: it grows with its strength and its gradient, and falls with its parameters."""

from __future__ import annotations

import pytest
import torch

from rankwise.method.worth import worth


def test_it_is_strength_times_gradient_by_a_power_of_the_parameters() -> None:
    strengths, gradients = torch.tensor([3.0, 0.5, 0.0]).double(), torch.tensor([2.0, 8.0, 5.0]).double()
    found = worth(strengths, gradients, torch.tensor([7, 4, 3]), target_r=1)
    assert found.square().tolist() == pytest.approx([6 / 7 ** (4 / 3), 4 / 4 ** (4 / 3), 0.0], rel=1e-12)


def test_below_an_average_rank_of_1_costs_count_more() -> None:
    strengths, gradients = torch.tensor([3.0, 0.5, 0.0]).double(), torch.tensor([2.0, 8.0, 5.0]).double()
    costs = torch.tensor([7, 4, 3])
    found = worth(strengths, gradients, costs, target_r=0.5)
    assert found.square().tolist() == pytest.approx([6 / 7**3, 4 / 4**3, 0.0], rel=1e-12)
    strong_and_wide = torch.tensor([9.0, 1.0]), torch.ones(2), torch.tensor([5, 2])
    assert worth(*strong_and_wide, target_r=1).argmax() == 0
    assert worth(*strong_and_wide, target_r=0.9).argmax() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    values = torch.tensor([6e4, 1.0]), torch.tensor([6e4, 3.0]), torch.tensor([100_000_000, 20_000])
    found = worth(values[0].to(dtype), values[1].to(dtype), values[2], target_r=0.25)
    torch.testing.assert_close(found, worth(*values, target_r=0.25), rtol=0.01, atol=0)


@pytest.mark.parametrize("target_r", [8, 0.25])
def test_the_unit_of_gradients_changes_no_order(target_r: float) -> None:
    torch.manual_seed(0)
    strengths, gradients, costs = torch.rand(50), torch.rand(50), torch.randint(1, 9, (50,))
    orders = [worth(strengths, unit * gradients, costs, target_r).argsort().tolist() for unit in (1.0, 1e6)]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("target_r", [8, 0.25])
@pytest.mark.parametrize("size", [1e-30, 1e37])
def test_strengths_and_gradients_of_any_size_keep_their_order(target_r: float, size: float) -> None:
    torch.manual_seed(0)
    strengths, gradients, costs = torch.rand(50) + 0.1, torch.rand(50) + 0.1, torch.randint(1, 9, (50,))
    found = worth(strengths * size, gradients * size, costs, target_r)
    expected = worth(strengths.double() * size, gradients.double() * size, costs, target_r)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
