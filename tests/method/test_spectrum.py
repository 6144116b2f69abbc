"""The sketch of a gradient, compared with its exact singular values in float64; and its size, with an adapter's."""

from __future__ import annotations

import pytest
import torch

from rankwise.method.spectrum import OVERSAMPLING, GradientSketch, effective_rank


def tokens(d_out: int, d_in: int, decay: float, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches whose gradient has singular values that decrease about as i^-decay."""
    torch.manual_seed(seed)
    size = min(d_out, d_in)
    U, V = (torch.linalg.qr(torch.randn(d, size, dtype=torch.float64)).Q for d in (d_out, d_in))
    strength = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    made = []
    for _ in range(3):
        rows = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
        made.append((rows @ V.T, rows @ (strength[:, None] * U.T)))
    return made


def sketched(
    batches: list[tuple[torch.Tensor, torch.Tensor]], directions: int, seed: int = 1
) -> GradientSketch:
    (x, dy), *_ = batches
    generator = torch.Generator().manual_seed(seed)
    sketch = GradientSketch(dy.shape[-1], x.shape[-1], directions, generator, torch.float64)
    for _ in range(sketch.passes):
        for x, dy in batches:
            sketch.add(x, dy)
        sketch.end_pass()
    return sketch


def exact(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return torch.linalg.svdvals(sum(dy.T @ x for x, dy in batches))


@pytest.mark.parametrize(("d_out", "d_in"), [(200, 300), (300, 200), (12, 700)])
def test_leading_singular_values_are_those_of_the_whole_gradient(d_out: int, d_in: int) -> None:
    batches = tokens(d_out, d_in, decay=1.5)
    sketch, truth = sketched(batches, 12), exact(batches)
    assert sketch.exact == (d_out == 12)
    assert torch.allclose(sketch.singular_values(), truth[:12], rtol=0.15)
    assert torch.allclose(sketch.singular_values()[:4], truth[:4], rtol=1e-2)
    assert bool((sketch.singular_values() <= truth[:12] * (1 + 1e-9)).all()), "never too large"
    assert sketch.norm() ** 2 == pytest.approx(float(truth.square().sum()), rel=0.5)


def test_a_gradient_of_few_directions_is_found_exactly() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(5, 400, dtype=torch.float64), torch.randn(5, 300, dtype=torch.float64)
    sketch, truth = sketched([(x, dy)], 8), exact([(x, dy)])
    assert not sketch.exact
    assert torch.allclose(sketch.singular_values()[:5], truth[:5], rtol=1e-10)
    assert float(sketch.singular_values()[5:].max()) < 1e-10 * float(truth[0])


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize(("d_out", "d_in"), [(4096, 4096), (1024, 4096), (384, 384), (30522, 384)])
def test_a_sketch_is_no_larger_than_an_adapter_in_training(d_out: int, d_in: int, rank: int) -> None:
    sketch = GradientSketch(d_out, d_in, rank, torch.Generator())
    factors = rank * (d_out + d_in)
    assert (
        sketch.numbers <= (rank + OVERSAMPLING) * (d_out + d_in) <= 4 * factors
    )  # weights, gradients, and two states of Adam


def test_effective_rank_counts_equal_directions_whatever_their_size() -> None:
    assert effective_rank([5.0] * 7 + [0.0] * 9) == pytest.approx(7)
    assert effective_rank([0.5] * 7) == pytest.approx(7)
    assert 1 < effective_rank([1.0, 0.1]) < 2 and effective_rank([]) == 0


@pytest.mark.parametrize(("d_out", "d_in"), [(60, 50), (12, 90)])
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e19, 1e30])
def test_gradients_of_any_size_have_the_singular_values_of_their_size(
    d_out: int, d_in: int, size: float
) -> None:
    batches = tokens(d_out, d_in, decay=1.5)
    found = []
    for by in (1.0, size):
        sketch = GradientSketch(d_out, d_in, 8, torch.Generator().manual_seed(1))
        for _ in range(sketch.passes):
            for x, dy in batches:
                sketch.add(x, dy.float() * by)
            sketch.end_pass()
        assert sketch.size() > 0
        found.append([*(sketch.singular_values() / by).tolist(), sketch.norm() / by])
    assert sketch.exact == (d_out == 12)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
