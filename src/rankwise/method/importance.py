"""What is scored of an adapter, step by step: every element, as in the paper.

A step's products ``w * dL/dw`` of the factors go in; out come the entries that the running averages are kept of, and
from the averages one score per triplet. The averages themselves are in `rankwise.method.scores`.
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
    """What a controller needs to know of a way to score; one for each form that scores gradients."""

    # The factors whose products are looked at, in the order in which `measure` takes them.
    factors: ClassVar[tuple[str, ...]]
    # The factor without which, if it does not train, a layer is frozen and keeps the ranks that it has.
    decisive: ClassVar[str]

    @property
    def entries(self) -> int:
        """How many numbers each running average has."""

    def measure(
        self, products: Sequence[Tensor | None], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """The step's importance, (entries,), of either sign, from ``w * dL/dw`` of every factor of every layer.

        Also which entries are known, (entries,), bool: those whose factor had a gradient. None: all.
        """

    def per_triplet(self, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        """One score for each triplet, (triplets,), from the running averages, (entries,)."""


class ElementImportance:
    """The paper's (Zhang et al., 2023, section 3.2): every element of A, E and B is scored by itself."""

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
