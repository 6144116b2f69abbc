"""Principal directions of any numbers that factors can hold: nothing raises, and a layer that can't be turned stays."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.method.principal import Principal, principal_directions

FLOAT32 = torch.finfo(torch.float32)
LEAST = 2.0**-149  # the distance between neighbouring subnormal numbers in float32


def randoms(rank: int, width_in: int, width_out: int, layers: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank + 10 * width_in + 100 * width_out)
    A = torch.randn(layers, rank, width_in, generator=generator, dtype=torch.float64)
    return A, torch.randn(layers, width_out, rank, generator=generator, dtype=torch.float64)


def all_act(A: Tensor) -> Tensor:
    return torch.ones(A.shape[:2], dtype=torch.bool)


def check(A: Tensor, B: Tensor, acts: Tensor, found: Principal) -> None:
    """Check by float64, which holds the products, that a turned float32 layer is right."""
    wide_A, wide_B = A[0].double() * acts[0][:, None], B[0].double() * acts[0]
    update, got = wide_B @ wide_A, found.B[0].double() @ found.A[0].double()
    size = float((wide_B.norm(dim=0) * wide_A.norm(dim=1)).sum())
    # Subnormal factors can't be closer to the right ones than subnormal numbers are to each other.
    norms = float(wide_A.norm() + wide_B.norm() + found.A[0].double().norm() + found.B[0].double().norm())
    allowed = 3e-5 * size + 4 * LEAST * math.sqrt(A.numel() + B.numel()) * norms
    assert float((got - update).norm()) <= allowed
    most = min(update.shape[0], update.shape[1], A.shape[1])
    expected = torch.linalg.svdvals(update)[:most].clamp(max=FLOAT32.max)
    assert float((found.strengths[0, :most].double() - expected).abs().max()) <= allowed + LEAST
    assert not found.strengths[0, most:].double().gt(allowed).any()
    assert bool((found.strengths[0].diff() <= allowed).all()), "falling"
    assert all(bool(part.isfinite().all()) for part in found[:5])


def check_stays(A: Tensor, B: Tensor, found: Principal) -> None:
    assert torch.equal(found.A, A) and torch.equal(found.B, B)
    eye = torch.eye(A.shape[1]).expand(1, -1, -1)
    assert torch.equal(found.turn, eye) and torch.equal(found.inverse, eye)
    assert bool(found.strengths.isfinite().all())


CASES = {
    "both times 1e19": lambda A, B: (A * 1e19, B * 1e19),
    "one entry of 1e25 in both": lambda A, B: (with_entry(A, 1e25), with_entry(B, 1e25)),
    "A alone times 1e20": lambda A, B: (A * 1e20, B),
    "B alone times 1e20": lambda A, B: (A, B * 1e20),
    "one entry of 3e19": lambda A, B: (with_entry(A, 3e19), B),
    "A tiny, B huge": lambda A, B: (A * 1e-25, B * 1e25),
    "A huge, B tiny": lambda A, B: (A * 1e25, B * 1e-25),
    "both huge": lambda A, B: (A * 1e36, B * 1e36),
    "both tiny": lambda A, B: (A * 1e-25, B * 1e-25),
    "A subnormal": lambda A, B: (A * 1e-41, B),
    "A subnormal, B huge": lambda A, B: (A * 1e-41, B * 1e36),
    "B subnormal": lambda A, B: (A, B * 1e-41),
    "B is 0": lambda A, B: (A, B * 0),
    "A is 0": lambda A, B: (A * 0, B),
    "A is 0, B huge": lambda A, B: (A * 0, B * 1e36),
    "all is 0": lambda A, B: (A * 0, B * 0),
    "equal rows of A": lambda A, B: (A[:, :1].expand_as(A) * 1e19, B * 1e19),
    "triplets that cancel": lambda A, B: (
        A[:, :1].expand_as(A) * 1e19,
        torch.cat([B, -B], 2)[:, :, : B.shape[2]],
    ),
    "rank 1": lambda A, B: (A[:, :1] * 1e20, B[:, :, :1] * 1e15),
}


def with_entry(values: Tensor, entry: float) -> Tensor:
    values = values.clone()
    values[0, -1, 0] = entry
    return values


@pytest.mark.parametrize("shape", [(4, 10, 7), (6, 4, 9), (6, 9, 4), (3, 3, 3)])
@pytest.mark.parametrize("case", CASES)
def test_products_and_strengths_are_right_for_numbers_of_any_size(
    case: str, shape: tuple[int, int, int]
) -> None:
    A, B = (each.float() for each in CASES[case](*randoms(*shape)))
    found = principal_directions(A, B, all_act(A))
    assert found.finite.tolist() == [True]
    check(A, B, all_act(A), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7)),
    powers=st.tuples(st.integers(-50, 50), st.integers(-50, 50)),
)
@settings(deadline=None, max_examples=50)
def test_scaling_the_factors_by_powers_of_two_scales_the_result_and_changes_no_digit(
    dtype: torch.dtype, shape: tuple[int, int, int], powers: tuple[int, int]
) -> None:
    A, B = (each.to(dtype) for each in randoms(*shape, layers=2))
    by_A, by_B = (2.0 ** (power * (1 if dtype == torch.float32 else 9)) for power in powers)
    plain, scaled = (principal_directions(a, b, all_act(A)) for a, b in ((A, B), (A * by_A, B * by_B)))
    assert torch.equal(scaled.A, plain.A * by_A)
    assert torch.equal(scaled.turn, plain.turn) and torch.equal(scaled.inverse, plain.inverse)
    small = torch.finfo(dtype).tiny / torch.finfo(dtype).eps  # below it, digits are lost
    for got, expected in ((scaled.B, plain.B * by_B), (scaled.strengths, plain.strengths * by_A * by_B)):
        torch.testing.assert_close(got, expected.clamp(max=torch.finfo(dtype).max), rtol=0, atol=small)


@st.composite
def any_layer(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A float32 layer: triplets of different sizes, some equal, some 0, some with large numbers, some switched off."""
    rank, width_in, width_out = (draw(st.integers(1, most)) for most in (6, 7, 7))
    A, B = randoms(rank, width_in, width_out)
    common = [draw(st.integers(-44, 37)) for _ in "AB"]
    spread = draw(st.sampled_from([0, 0, 3, 20]))
    for place in range(rank):
        kind = draw(st.sampled_from(["plain", "plain", "plain", "no A", "no B", "equal"]))
        if kind == "equal":
            A[0, place], B[0, :, place] = A[0, 0], B[0, :, 0]
        for values, exponent, nothing in zip((A[0], B[0].T), common, ("no A", "no B"), strict=True):
            own = 0.0 if kind == nothing else 10.0 ** (exponent + draw(st.integers(-spread, spread)))
            values[place] *= own
    for values in (A, B):
        if draw(st.booleans()):
            entry = draw(st.floats(-FLOAT32.max, FLOAT32.max, width=32))
            values.view(-1)[draw(st.integers(0, values.numel() - 1))] = entry
    clamped = (each.clamp(-FLOAT32.max, FLOAT32.max).float() for each in (A, B))
    acts = torch.tensor([[draw(st.sampled_from([True, True, True, False])) for _ in range(rank)]])
    return (*clamped, acts)  # type: ignore[return-value]


@given(any_layer())
@settings(deadline=None, max_examples=400)
def test_any_finite_layer_is_turned_rightly_or_stays_as_it_is(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    A, B, acts = layer
    found = principal_directions(A, B, acts)
    if found.finite.item():
        check(A, B, acts, found)
        return
    check_stays(A, B, found)
    # It stays for a reason: its new factors would overflow, or no triplet is large in both A and B.
    a, b = A[0].double() * acts[0][:, None], B[0].double() * acts[0]
    rows, columns = a.abs().amax(1), b.abs().amax(0)
    overflows = max(float(a.norm()), float(b.norm())) > FLOAT32.max / 16
    apart = float((rows * columns).max() / (rows.max() * columns.max())) < 1e-29
    assert overflows or apart


@given(any_layer(), st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans(), st.data())
@settings(deadline=None, max_examples=50)
def test_a_layer_that_is_not_finite_stays_and_its_neighbours_are_turned(
    layer: tuple[Tensor, Tensor, Tensor], value: float, in_A: bool, data: st.DataObject
) -> None:
    A, B, acts = layer
    good = principal_directions(A, B, acts)
    broken_A, broken_B = A.clone(), B.clone()
    values = broken_A if in_A else broken_B
    values.view(-1)[data.draw(st.integers(0, values.numel() - 1))] = value
    found = principal_directions(
        torch.cat([A, broken_A, A]), torch.cat([B, broken_B, B]), torch.cat([acts, acts, acts])
    )
    assert found.finite.tolist() == [good.finite.item(), False, good.finite.item()]
    torch.testing.assert_close(found.A[1], broken_A[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.B[1], broken_B[0], rtol=0, atol=0, equal_nan=True)
    assert not found.strengths[1].any()
    for n in (0, 2):
        torch.testing.assert_close(found.B[n] @ found.A[n], good.B[0] @ good.A[0], equal_nan=True)


def test_a_layer_that_stays_although_it_is_finite_has_the_strengths_of_its_triplets() -> None:
    apart = torch.tensor([1e-25, 1e25, 1.0])
    A, B = (each.float() for each in randoms(3, 5, 4))
    A, B = A * apart[None, :, None], B / apart
    acts = torch.tensor([[True, True, False]])
    found = principal_directions(A, B, acts)
    assert found.finite.tolist() == [False]
    check_stays(A, B, found)
    expected = A.double().norm(dim=2) * B.double().norm(dim=1) * acts
    torch.testing.assert_close(found.strengths.double(), expected)


def test_strengths_beyond_the_dtype_are_its_largest_number_and_the_others_keep_their_order() -> None:
    A, B = torch.eye(3)[None] * 1e30, torch.diag(torch.tensor([1e20, 1e3, 1.0]))[None]
    found = principal_directions(A, B, all_act(A))
    assert found.strengths.tolist() == [[FLOAT32.max, pytest.approx(1e33), pytest.approx(1e30)]]


@pytest.mark.parametrize("which", ["svd", "pinv", "qr"])
def test_a_decomposition_that_fails_leaves_its_layer_and_no_other(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    A, B = (each.float() for each in randoms(4, 8, 6, layers=3))
    expected = principal_directions(A, B, all_act(A))
    decompose, failed = getattr(torch.linalg, which), []

    def failing(matrix: Tensor, *args: object, **kwargs: object) -> object:
        # LAPACK fails for a whole batch if it fails for one of its matrices; here for the layer with the number `bad`.
        if len(matrix) > 1 or failed.append(0) or len(failed) == bad:
            raise torch.linalg.LinAlgError("did not converge")
        return decompose(matrix, *args, **kwargs)

    bad = 2 if which != "qr" else 3  # a layer takes two QRs
    monkeypatch.setattr(torch.linalg, which, failing)
    found = principal_directions(A, B, all_act(A))
    monkeypatch.undo()
    assert found.finite.tolist() == [True, False, True]
    check_stays(A[1:2], B[1:2], Principal(*(part[1:2] for part in found)))
    for got, right in zip(found[:5], expected[:5], strict=True):
        torch.testing.assert_close(got[::2], right[::2])
    parts = A[1].norm(dim=1) * B[1].norm(dim=0)
    torch.testing.assert_close(found.strengths[1], parts)
