"""The running averages and the scores of triplets, against closed forms in float64."""

from __future__ import annotations

import math
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from cases import random_cases, random_factors, random_layout, seeds
from rankwise.method.layout import TripletLayout
from rankwise.method.scores import flatten, triplet_scores, update_scores


@pytest.mark.parametrize(("beta1", "beta2"), [(0.85, 0.9), (0.5, 0.2), (0.1, 0.99)])
def test_a_steady_importance_gives_the_averages_of_the_closed_form(beta1: float, beta2: float) -> None:
    """I (1 - b1^n), and I (1 - b2) b1 (b1^n - b2^n) / (b1 - b2), the sum of a geometric series."""
    product = torch.tensor([-3.0, 0.0, 0.25], dtype=torch.float64)
    sensitivity, uncertainty = torch.zeros_like(product), torch.zeros_like(product)
    for n in range(1, 30):
        assert update_scores(sensitivity, uncertainty, product.clone(), beta1, beta2)
        share = (1 - beta2) * beta1 * (beta1**n - beta2**n) / (beta1 - beta2)
        torch.testing.assert_close(sensitivity, product.abs() * (1 - beta1**n), rtol=1e-6, atol=0)
        torch.testing.assert_close(uncertainty, product.abs() * share, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_leaves_the_whole_step_out(bad: float) -> None:
    averages = torch.rand(2, 4, dtype=torch.float64)
    before = averages.clone()
    importance = torch.tensor([1.0, bad, 2.0, 3.0], dtype=torch.float64)
    assert not update_scores(averages[0], averages[1], importance, 0.8, 0.9)
    assert torch.equal(averages, before)


def test_factors_without_a_gradient_keep_their_averages_and_the_others_are_updated() -> None:
    known = torch.tensor([True, False, True])
    start, product = torch.rand(2, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    partly, wholly = start.clone(), start.clone()
    assert update_scores(partly[0], partly[1], product.clone(), 0.8, 0.9, known)
    assert update_scores(wholly[0], wholly[1], product.clone(), 0.8, 0.9)
    assert torch.equal(partly[:, 1], start[:, 1])
    assert torch.equal(partly[:, known], wholly[:, known]) and not torch.equal(wholly, start)


def test_a_triplets_score_is_the_papers_sum_of_means() -> None:
    layout = TripletLayout(ranks=(1, 2), widths_in=(2, 3), widths_out=(3, 1))
    torch.manual_seed(0)
    sensitivity, uncertainty = torch.rand(2, layout.elements, dtype=torch.float64)
    s = sensitivity * uncertainty
    expected = torch.stack(
        [
            s[0:2].mean() + s[8] + s[11:14].mean(),
            s[2:5].mean() + s[9] + s[14],
            s[5:8].mean() + s[10] + s[15],
        ]
    )
    torch.testing.assert_close(triplet_scores(layout, sensitivity, uncertainty), expected)


def test_matrices_are_laid_end_to_end_row_by_row_in_float32() -> None:
    flat = flatten(
        [torch.tensor([[1, 2], [3, 4]]).bfloat16(), torch.tensor([[5.0]]).double()], torch.device("cpu")
    )
    assert flat.tolist() == [1, 2, 3, 4, 5] and flat.dtype == torch.float32


class ElementByElement:
    """The running averages of the paper's equations 8 to 10, in float64, one element at a time."""

    def __init__(self, factors: list[Tensor], beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity = [[0.0] * matrix.numel() for matrix in factors]
        self.uncertainty = [[0.0] * matrix.numel() for matrix in factors]

    def update(self, factors: list[Tensor], gradients: list[Tensor | None]) -> None:
        given = [gradient for gradient in gradients if gradient is not None]
        if not all(math.isfinite(value) for gradient in given for value in gradient.flatten().tolist()):
            return
        for number, (matrix, gradient) in enumerate(zip(factors, gradients, strict=True)):
            if gradient is None:
                continue
            pairs = zip(matrix.flatten().tolist(), gradient.flatten().tolist(), strict=True)
            for place, (w, g) in enumerate(pairs):
                importance = abs(w * g)
                mean = self.beta1 * self.sensitivity[number][place] + (1 - self.beta1) * importance
                spread = self.uncertainty[number][place]
                self.sensitivity[number][place] = mean
                self.uncertainty[number][place] = self.beta2 * spread + (1 - self.beta2) * abs(
                    importance - mean
                )


@random_cases(150)
@given(seeds, st.floats(0.05, 0.99), st.floats(0.05, 0.99), st.sampled_from([1e-6, 1.0, 1e3]))
def test_the_flat_scores_equal_an_update_element_by_element(
    seed: int, beta1: float, beta2: float, scale: float
) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    layout = random_layout(generator)
    reference = ElementByElement(random_factors(layout, 1.0), beta1, beta2)
    sensitivity, uncertainty = torch.zeros(layout.elements), torch.zeros(layout.elements)
    counted = []
    for _ in range(4):
        factors, gradients = random_factors(layout, scale), random_factors(layout, scale)
        partly: list[Tensor | None] = [None if generator.random() < 0.2 else g for g in gradients]
        broken = generator.random() < 0.2
        for gradient in partly:
            if broken and gradient is not None:
                gradient.view(-1)[0] = generator.choice([math.nan, math.inf, -math.inf])
        known = torch.cat(
            [
                torch.full((matrix.numel(),), gradient is not None)
                for matrix, gradient in zip(factors, partly, strict=True)
            ]
        )
        filled = [g if g is not None else torch.zeros_like(m) for m, g in zip(factors, partly, strict=True)]
        importance = [matrix * gradient for matrix, gradient in zip(factors, filled, strict=True)]
        cpu = torch.device("cpu")
        counted.append(
            bool(update_scores(sensitivity, uncertainty, flatten(importance, cpu), beta1, beta2, known))
        )
        reference.update(factors, partly)
        assert counted[-1] == (not broken or all(gradient is None for gradient in partly))
    for ours, theirs in ((sensitivity, reference.sensitivity), (uncertainty, reference.uncertainty)):
        expected = torch.tensor([value for matrix in theirs for value in matrix], dtype=torch.float64)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6 * scale**2)


@random_cases(200)
@given(seeds)
def test_triplet_scores_equal_a_loop_over_rows_and_columns(seed: int) -> None:
    torch.manual_seed(seed)
    layout = random_layout(random.Random(seed))
    count = len(layout.ranks)
    sensitivity = [matrix.abs() for matrix in random_factors(layout, 1.0)]
    uncertainty = [matrix.abs() for matrix in random_factors(layout, 1.0)]
    element = [(s.double() * u.double()) for s, u in zip(sensitivity, uncertainty, strict=True)]
    A, E, B = element[:count], element[count : 2 * count], element[2 * count :]
    expected = []
    for a, e, b in zip(A, E, B, strict=True):
        for i in range(a.shape[0]):
            row, column = a[i].tolist(), b[:, i].tolist()
            expected.append(float(e[i, 0]) + sum(row) / len(row) + sum(column) / len(column))
    cpu = torch.device("cpu")
    ours = triplet_scores(layout, flatten(sensitivity, cpu), flatten(uncertainty, cpu))
    torch.testing.assert_close(
        ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e18, 1e37])
def test_averages_of_any_size_put_triplets_in_the_right_order(size: float) -> None:
    layout = TripletLayout(ranks=(3, 2), widths_in=(4, 5), widths_out=(3, 6))
    torch.manual_seed(0)
    plain = [torch.rand(layout.elements, dtype=torch.float64) for _ in range(2)]
    expected = triplet_scores(layout, *plain)
    found = triplet_scores(layout, *((each * size).float() for each in plain))
    assert found.isfinite().all()
    torch.testing.assert_close(found.double() / found.max(), expected / expected.max(), rtol=1e-5, atol=0)


def test_a_step_counts_as_long_as_its_numbers_are_finite() -> None:
    sensitivity, uncertainty = torch.zeros(2), torch.zeros(2)
    huge = torch.full((2,), 3e38)  # their sum is infinite
    assert update_scores(sensitivity, uncertainty, huge, 0.5, 0.5)
    assert sensitivity.tolist() == pytest.approx([1.5e38] * 2) and uncertainty.isfinite().all()
    nothing = torch.zeros(0)
    assert update_scores(nothing.clone(), nothing.clone(), nothing.clone(), 0.5, 0.5)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_averages_do_not_depend_on_the_default_dtype(default: torch.dtype) -> None:
    found = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            sensitivity, uncertainty = (torch.zeros(1, dtype=torch.float32) for _ in "SU")
            update_scores(sensitivity, uncertainty, torch.tensor([3.0], dtype=torch.float32), 0.85, 0.9)
            found.append((sensitivity.item(), uncertainty.item()))
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == found[1]
