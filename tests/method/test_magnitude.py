"""Scaling by powers of two is exact, and norms are right whenever the numbers themselves are finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.method.magnitude import largest, power_below, scaled_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_a_power_below_is_exact_for_every_number_of_the_dtype(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    info = torch.finfo(dtype)
    numbers = st.floats(0, info.max, width=32 if dtype == torch.float32 else 64, allow_subnormal=True)
    value = data.draw(numbers)
    power = float(power_below(torch.tensor(value, dtype=dtype)))
    assert math.frexp(power)[0] == 0.5, "no power of two"
    if value:
        assert power <= value < 2 * power
        assert float(torch.tensor(value, dtype=dtype) / power) * power == value


def test_values_that_are_not_finite_are_not_scaled() -> None:
    assert power_below(torch.tensor([torch.nan, torch.inf, 0.0])).tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1.0, 1e19, 1e37])
def test_a_norm_neither_overflows_nor_vanishes(size: float) -> None:
    values = torch.arange(1.0, 5).view(2, 2) * size
    expected = values.double() / size
    assert scaled_norm(values) / size == pytest.approx(float(expected.norm()), rel=1e-12)
    assert scaled_norm(values.double() * 1e200) / 1e200 == pytest.approx(scaled_norm(values), rel=1e-12)


def test_norms_of_empty_tensors_and_of_values_that_are_not_finite() -> None:
    assert scaled_norm(torch.zeros(0, 3)) == scaled_norm(torch.zeros(2, 3)) == 0
    assert math.isnan(scaled_norm(torch.tensor([1.0, torch.nan])))
    assert scaled_norm(torch.tensor([1.0, -torch.inf])) == math.inf
    assert largest(torch.zeros(2, 0, 3), (1,)).shape == (2, 1, 3)
