"""Principal directions against the singular value decomposition of the whole update, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.method.principal import Principal, principal_directions

SHAPES = [(4, 10, 7), (6, 4, 9), (6, 9, 4), (1, 5, 5), (3, 3, 3)]  # r, d_in, d_out


def factors(rank: int, width_in: int, width_out: int, layers: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank + width_in)
    A = torch.randn(layers, rank, width_in, dtype=torch.float64)
    return A, torch.randn(layers, width_out, rank, dtype=torch.float64)


def all_act(A: Tensor) -> Tensor:
    return torch.ones(A.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_stays_and_its_triplets_are_singular(shape: tuple[int, int, int]) -> None:
    A, B = factors(*shape)
    found = principal_directions(A, B, all_act(A))
    torch.testing.assert_close(found.B @ found.A, B @ A)
    expected = torch.linalg.svdvals(B @ A)[:, : min(shape)]
    torch.testing.assert_close(found.strengths[:, : min(shape)], expected)
    assert not found.strengths[:, min(shape) :].abs().gt(1e-9).any()
    parts = found.A.norm(dim=2) * found.B.norm(dim=1)
    torch.testing.assert_close(parts, found.strengths)
    gram = found.B.mT @ found.B
    torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2)))


@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[2:])
def test_the_pace_stays_as_rows_of_A_keep_their_mean_square(shape: tuple[int, int, int]) -> None:
    A, B = factors(*shape)
    found = principal_directions(A, B, all_act(A))
    count = min(shape[0], shape[1], shape[2])
    norm = A.square().sum(2).mean(1).sqrt()[:, None].expand(-1, count)
    torch.testing.assert_close(found.A.norm(dim=2)[:, :count], norm)


def test_cutting_the_last_directions_loses_as_little_as_the_best_approximation() -> None:
    A, B = factors(6, 12, 9)
    found = principal_directions(A, B, all_act(A))
    cut = found.B[:, :, :2] @ found.A[:, :2]
    values = torch.linalg.svdvals(B @ A)
    torch.testing.assert_close((B @ A - cut).square().sum((1, 2)), values[:, 2:].square().sum(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_turns_take_factors_and_gradients_along(shape: tuple[int, int, int]) -> None:
    A, B = factors(*shape)
    found = principal_directions(A, B, all_act(A))
    torch.testing.assert_close(found.turn @ A, found.A)
    torch.testing.assert_close(B @ found.inverse, found.B)
    # The gradients of A and B are B^T G and G A^T, whatever the basis.
    G = torch.randn_like(B @ A)
    torch.testing.assert_close(found.inverse.mT @ (B.mT @ G), found.B.mT @ G)
    if min(shape) == shape[0]:
        torch.testing.assert_close((G @ A.mT) @ found.turn.mT, G @ found.A.mT)


def test_triplets_that_do_not_act_take_no_part_and_the_others_come_first() -> None:
    A, B = factors(5, 9, 8)
    acts = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found = principal_directions(A, B, acts)
    torch.testing.assert_close(found.B @ found.A, (B * acts[:, None]) @ A)
    assert [int((row > 0).sum()) for row in found.strengths] == [3, 0, 5]
    assert bool(found.A.isfinite().all() and found.turn.isfinite().all() and found.inverse.isfinite().all())


def degenerate(kind: str) -> tuple[Tensor, Tensor]:
    A, B = factors(4, 8, 6)
    if kind == "B is 0":
        B.zero_()
    elif kind == "A is 0":
        A.zero_()
    elif kind == "equal rows":
        A[:] = A[:, :1]
    elif kind == "tiny":
        A, B = A * 1e-150, B * 1e-150
    return A, B


@pytest.mark.parametrize("kind", ["B is 0", "A is 0", "equal rows", "tiny"])
def test_degenerate_factors_give_finite_factors_with_the_same_product(kind: str) -> None:
    A, B = degenerate(kind)
    found: Principal = principal_directions(A, B, all_act(A))
    torch.testing.assert_close(found.B @ found.A, B @ A)
    assert all(part.isfinite().all() for part in found[:5])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_layer_that_is_not_finite_stays_as_it_is_and_spoils_no_other(value: float) -> None:
    A, B = factors(4, 8, 6)
    B[1, 2, 3] = value
    found = principal_directions(A, B, all_act(A))
    assert found.finite.tolist() == [True, False, True]
    torch.testing.assert_close(found.A[1], A[1])
    torch.testing.assert_close(found.B[1], B[1], equal_nan=True)
    assert not found.strengths[1].any()
    torch.testing.assert_close((found.B @ found.A)[::2], (B @ A)[::2])
