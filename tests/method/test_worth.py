"""What a direction is worth: more for a stronger one, a larger gradient, fewer parameters."""

from __future__ import annotations

import math

import torch

from rankwise.method.worth import worth


def test_it_is_the_root_of_strength_times_gradient_for_each_parameter() -> None:
    strengths, gradients = torch.tensor([3.0, 0.5, 0.0]).double(), torch.tensor([2.0, 8.0, 5.0]).double()
    found = worth(strengths, gradients, torch.tensor([7, 4, 3]))
    assert found.tolist() == [math.sqrt(6) / 7, math.sqrt(4) / 4, 0.0]


def test_the_unit_of_gradients_changes_no_order() -> None:
    torch.manual_seed(0)
    strengths, gradients, costs = torch.rand(50), torch.rand(50), torch.randint(1, 9, (50,))
    orders = [worth(strengths, unit * gradients, costs).argsort().tolist() for unit in (1.0, 1e6)]
    assert orders[0] == orders[1]
