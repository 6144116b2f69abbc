"""What is scored of an adapter: every element, as in the paper, or every gate.

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
    """What a controller needs to know of a way to score; one for each form of AdaLoRA."""

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

    factors: ClassVar[tuple[str, ...]] = ("lora_A", "lora_E", "lora_B")
    decisive: ClassVar[str] = "lora_E"

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


class GateImportance:
    """Every triplet is scored as a whole, by what closing its gate would change in the loss.

    With the update ``sum_i E_i b_i a_i^T``, the loss changes by about ``-E_i dL/dE_i`` when gate i closes, and
    ``E_i dL/dE_i = b_i . dL/db_i``: so column sums of ``B * dL/dB`` are all that is needed, whatever E is. What a
    triplet is worth is that, smoothed and weighted by its uncertainty as in the paper, for each of its parameters.

    Example:
        >>> layout = TripletLayout(ranks=(2,), widths_in=(1,), widths_out=(3,))
        >>> products = [torch.tensor([[1.0, 0.0], [2.0, 0.0], [-4.0, 3.0]])]
        >>> GateImportance(layout).measure(products, torch.device("cpu"))
        (tensor([-1.,  3.]), None)
    """

    factors: ClassVar[tuple[str, ...]] = ("lora_B",)
    decisive: ClassVar[str] = "lora_B"

    def __init__(self, layout: TripletLayout) -> None:
        self.layout = layout

    @property
    def entries(self) -> int:
        return self.layout.triplets

    def measure(
        self, products: Sequence[Tensor | None], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        layout = self.layout
        sizes = list(map(operator.mul, layout.ranks, layout.widths_out))
        shapes = zip(layout.widths_out, layout.ranks, strict=True)
        filled = [
            product.view(shape)
            for product, shape in zip(_filled(products, sizes, device), shapes, strict=True)
        ]
        return layout.sum_of_columns(filled, device), _known(products, layout.ranks, device)

    def per_triplet(self, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        costs = self.layout.costs_on(sensitivity.device)
        return (sensitivity * uncertainty).sqrt_() / costs


def _filled(products: Sequence[Tensor | None], sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    return [
        torch.zeros(size, device=device) if product is None else product
        for product, size in zip(products, sizes, strict=True)
    ]


def _known(products: Sequence[Tensor | None], sizes: Sequence[int], device: torch.device) -> Tensor | None:
    if all(product is not None for product in products):
        return None
    present = torch.tensor([product is not None for product in products], device=device)
    return present.repeat_interleave(torch.tensor(sizes, device=device), output_size=sum(sizes))
