"""The paper's importance, which scores every element of A, E and B.

Each step takes the products ``w * dL/dw`` of the factors and returns the entries of the running averages. From the
averages comes one score per triplet. `rankwise.method.scores` updates the averages.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rankwise.method.layout import TripletLayout
from rankwise.method.scores import flatten, triplet_scores


class Importance(Protocol):
    """A way to score gradients, as a controller uses it. Each form that scores gradients has one."""

    # The factors whose products are measured, in the order in which `measure` takes them.
    factors: ClassVar[tuple[str, ...]]
    # The factor that decides whether a layer is frozen: if it does not train, the layer keeps its ranks.
    decisive: ClassVar[str]

    @property
    def entries(self) -> int:
        """The number of entries of each running average."""

    def measure(
        self, products: Sequence[Tensor | None], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """The importance of one step, (entries,), of either sign, from ``w * dL/dw`` of every factor of every layer.

        The second result tells which entries are known because their factor had a gradient, (entries,), bool. None
        means all.
        """

    def per_triplet(self, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        """One score per triplet, (triplets,), from the running averages, (entries,)."""


class ElementImportance:
    """The paper's importance (Zhang et al., 2023, section 3.2): every element of A, E and B has its own score."""

    factors: ClassVar[tuple[str, ...]] = ("A", "E", "B")
    decisive: ClassVar[str] = "E"

    def __init__(self, layout: TripletLayout) -> None:
        self.layout = layout
        self.sizes = [
            *map(operator.mul, layout.ranks, layout.widths_in),
            *layout.ranks,
            *map(operator.mul, layout.ranks, layout.widths_out),
        ]

    @property
    def entries(self) -> int:
        return self.layout.elements

    def measure(
        self, products: Sequence[Tensor | None], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        return flatten(_filled(products, self.sizes, device), device), _known(products, self.sizes, device)

    def per_triplet(self, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        return triplet_scores(self.layout, sensitivity, uncertainty)


def _filled(products: Sequence[Tensor | None], sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    return [
        torch.zeros(size, device=device, dtype=torch.float32) if product is None else product
        for product, size in zip(products, sizes, strict=True)
    ]


def _known(products: Sequence[Tensor | None], sizes: Sequence[int], device: torch.device) -> Tensor | None:
    if all(product is not None for product in products):
        return None
    present = torch.tensor([product is not None for product in products], device=device)
    return present.repeat_interleave(torch.tensor(sizes, device=device), output_size=sum(sizes))
