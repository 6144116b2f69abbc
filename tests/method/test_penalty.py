"""The orthogonality penalty and its gradient, in cases where both are known in closed form."""

from __future__ import annotations

import math
import random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from cases import random_cases, random_factors, random_layout, seeds
from rankwise.method.penalty import orthogonality_gradients, orthogonality_penalty


def orthonormal_rows(rank: int, width: int) -> Any:
    torch.manual_seed(0)
    return torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64)).Q.T.contiguous()


@pytest.mark.parametrize("stretch", [0.0, 0.5, 2.0])
def test_the_penalty_of_stretched_orthonormal_factors_is_the_distance_of_the_squared_stretch_from_1(
    stretch: float,
) -> None:
    """||c^2 I - I||_F = |c^2 - 1| sqrt(r), for rows and for columns."""
    A, B = stretch * orthonormal_rows(4, 9), orthonormal_rows(3, 5).T
    expected = abs(stretch**2 - 1) * math.sqrt(4) / 2  # the mean with B's, which is 0
    assert orthogonality_penalty([A], [B]).item() == pytest.approx(expected, abs=1e-12)
    assert orthogonality_penalty([B.T], [A.T]).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("columns", [False, True])
def test_the_gradient_of_stretched_orthonormal_factors_points_along_them(columns: bool) -> None:
    """d/dA |c^2 - 1| sqrt(r) with A = c Q is 2 A sign(c^2 - 1) / sqrt(r)."""
    for stretch in (0.5, 2.0):
        matrix = stretch * orthonormal_rows(4, 9)
        matrix = matrix.T if columns else matrix
        (gradient,) = orthogonality_gradients([matrix], columns, weight=0.3, count=6)
        expected = 0.3 / 6 * 2 * matrix * math.copysign(1, stretch**2 - 1) / math.sqrt(4)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_matrices_of_many_shapes_get_their_own_gradients_in_their_order() -> None:
    torch.manual_seed(1)
    matrices = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5), (3, 4), (2, 5), (1, 7))]
    together = orthogonality_gradients(matrices, False, weight=1.0, count=8)
    for matrix, gradient in zip(matrices, together, strict=True):
        (alone,) = orthogonality_gradients([matrix], False, weight=1.0, count=8)
        torch.testing.assert_close(gradient, alone)


def test_half_precision_is_widened_and_nothing_is_penalized_of_nothing() -> None:
    assert orthogonality_penalty([], []).item() == 0
    (gradient,) = orthogonality_gradients([torch.ones(2, 3).bfloat16()], False, weight=1.0, count=1)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@random_cases(150)
@given(seeds, st.floats(1e-3, 10), st.sampled_from([0.02, 1.0]))
def test_the_penaltys_gradient_is_autograds(seed: int, weight: float, scale: float) -> None:
    torch.manual_seed(seed)
    layout = random_layout(random.Random(seed))
    count = len(layout.ranks)
    factors = [(matrix.double() * scale).requires_grad_() for matrix in random_factors(layout, 1.0)]
    A, B = factors[:count], factors[2 * count :]
    norms = [torch.linalg.matrix_norm(a @ a.T - torch.eye(a.shape[0], dtype=a.dtype)) for a in A]
    norms += [torch.linalg.matrix_norm(b.T @ b - torch.eye(b.shape[1], dtype=b.dtype)) for b in B]
    loss = weight * torch.stack(norms).mean()
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(weight * orthogonality_penalty(A, B), loss)
        for matrices, columns in ((A, False), (B, True)):
            ours = orthogonality_gradients(matrices, columns, weight, count=2 * count)
            for matrix, gradient in zip(matrices, ours, strict=True):
                torch.testing.assert_close(gradient, matrix.grad, rtol=1e-9, atol=1e-12)


def test_the_penaltys_gradient_at_an_orthonormal_matrix_is_zero_and_not_nan() -> None:
    (gradient,) = orthogonality_gradients([torch.eye(3, 5)], False, weight=1.0, count=1)
    assert torch.equal(gradient, torch.zeros(3, 5))


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [14, 19, 30])
def test_matrices_of_a_run_that_diverges_have_finite_gradients(
    exponent: int, dtype: torch.dtype, columns: bool
) -> None:
    """The identity is negligible here. The gradient is 2 M M^T M / |M M^T|, which is as large as M."""
    torch.manual_seed(0)
    size = 10.0 ** (exponent if dtype == torch.float32 else 8 * exponent)
    plain = torch.randn(3, 7, dtype=torch.float64)
    expected = 0.5 / 4 * 2 * (plain @ plain.T) @ plain / (plain @ plain.T).norm()
    matrix = (plain * size).to(dtype)
    matrix = matrix.T if columns else matrix
    (gradient,) = orthogonality_gradients([matrix], columns, weight=0.5, count=4)
    got = gradient.double() / size
    torch.testing.assert_close(got, expected.T if columns else expected, rtol=1e-5, atol=1e-6)


def test_the_penalty_of_large_matrices_is_right_as_long_as_it_is_a_number_of_the_dtype() -> None:
    matrix = torch.eye(3, 5) * 1e18  # the squares of M M^T would overflow, but the penalty does not
    assert orthogonality_penalty([matrix], []).item() == pytest.approx(1e36 * math.sqrt(3), rel=1e-6)


def test_the_penalty_has_a_dtype_of_its_own() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert orthogonality_penalty([], []).dtype == torch.float32
        assert orthogonality_penalty([torch.eye(2)], []).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
