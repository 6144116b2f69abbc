"""The importance in each step: computed for every element, as in the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.method.importance import ElementImportance
from rankwise.method.layout import TripletLayout

CPU = torch.device("cpu")
LAYOUT = TripletLayout(ranks=(2, 3, 2), widths_in=(4, 5, 4), widths_out=(3, 6, 3))


def products_of_a_loss() -> dict[str, list[Tensor]]:
    """``w * dL/dw`` of A, E and B in float64 for a loss of ``B diag(E) A``."""
    torch.manual_seed(0)
    shapes = list(zip(LAYOUT.ranks, LAYOUT.widths_in, LAYOUT.widths_out, strict=True))
    options: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    A = [torch.randn(rank, width, **options) for rank, width, _ in shapes]
    E = [torch.randn(rank, 1, **options) for rank, _, _ in shapes]
    B = [torch.randn(width, rank, **options) for rank, _, width in shapes]
    loss = torch.stack(
        [(b @ torch.diag(e.flatten()) @ a).sin().sum() for a, e, b in zip(A, E, B, strict=True)]
    ).sum()
    loss.backward()
    return {
        name: [(w * w.grad).detach() for w in factors] for name, factors in (("A", A), ("E", E), ("B", B))
    }


def test_the_papers_importance_is_every_products_own() -> None:
    products = products_of_a_loss()
    importance = ElementImportance(LAYOUT)
    given = [p for key in importance.factors for p in products[key]]
    measured, known = importance.measure(given, CPU)
    assert torch.equal(measured, torch.cat([product.flatten() for product in given]).float())
    assert known is None and importance.entries == LAYOUT.elements


@pytest.mark.parametrize("kind", [ElementImportance])
def test_factors_without_a_gradient_are_distinguished_from_those_with_a_zero_gradient(kind: Any) -> None:
    products = products_of_a_loss()
    importance = kind(LAYOUT)
    given: list[Tensor | None] = [p for key in importance.factors for p in products[key]]
    whole, _ = importance.measure(given, CPU)
    given[1] = None  # the second layer's first factor
    measured, known = importance.measure(given, CPU)
    assert known is not None and not known.all() and known.shape == measured.shape
    assert torch.equal(measured[known], whole[known]) and not measured[~known].any()
