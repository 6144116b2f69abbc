"""Importance of every triplet: weights times gradients in, one score per triplet out.

Section 3.2 of the AdaLoRA paper (Zhang et al., 2023, https://arxiv.org/abs/2303.10512). For every element w of
A, E and B, with its gradient g:

    importance   I = |w * g|                                           (equation 8)
    sensitivity  S <- beta1 * S + (1 - beta1) * I                      (equation 9)
    uncertainty  U <- beta2 * U + (1 - beta2) * |I - S|                (equation 10, with the new S)

and a triplet i scores S*U at E_i, plus the mean of S*U over row i of A, plus its mean over column i of B
(equations 7 and 11).

The elements of all layers lie in one flat float32 vector, so that a step costs a handful of tensor operations
however many layers there are, and nothing leaves the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TripletLayout:
    """Where the triplets of all layers lie in flat vectors.

    Args:
        ranks: r of every layer, the number of its triplets.
        widths_in: columns of every A (r, width_in).
        widths_out: rows of every B (width_out, r).

    The flat *element* vector holds all A, then all E, then all B, in layer order; the flat *triplet* vector holds
    each layer's triplets in layer order.

    Example:
        >>> layout = TripletLayout(ranks=(2, 1), widths_in=(3, 3), widths_out=(4, 4))
        >>> layout.triplets, layout.elements
        (3, 24)
    """

    ranks: tuple[int, ...]
    widths_in: tuple[int, ...]
    widths_out: tuple[int, ...]
    _blocks: dict[tuple[str, int, int], tuple[list[int], list[int]]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    _on_device: dict[tuple[str, int, int, torch.device], Tensor] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        position = 0
        for kind, widths in (("A", self.widths_in), ("E", (1,) * len(self.ranks)), ("B", self.widths_out)):
            triplet = 0
            for rank, width in zip(self.ranks, widths, strict=True):
                starts, triplets = self._blocks.setdefault((kind, rank, width), ([], []))
                starts.append(position)
                triplets.extend(range(triplet, triplet + rank))
                position += rank * width
                triplet += rank

    @property
    def triplets(self) -> int:
        """The number of triplets of all layers."""
        return sum(self.ranks)

    @property
    def elements(self) -> int:
        """The number of elements of all A, E and B."""
        widths = zip(self.ranks, self.widths_in, self.widths_out, strict=True)
        return sum(rank * (width_in + 1 + width_out) for rank, width_in, width_out in widths)

    def round_robin(self) -> list[int]:
        """All triplets, every layer's first one first, then every layer's second one, and so on."""
        keyed = [
            (index, layer, index + sum(self.ranks[:layer]))
            for layer, rank in enumerate(self.ranks)
            for index in range(rank)
        ]
        return [triplet for _, _, triplet in sorted(keyed)]

    @functools.cached_property
    def costs(self) -> list[int]:
        """The numbers that each triplet has in A and B, in triplet order.

        Example:
            >>> TripletLayout(ranks=(2, 1), widths_in=(3, 5), widths_out=(4, 4)).costs
            [7, 7, 9]
        """
        widths = zip(self.ranks, self.widths_in, self.widths_out, strict=True)
        return [width_in + width_out for rank, width_in, width_out in widths for _ in range(rank)]

    def costs_on(self, device: torch.device) -> Tensor:
        """`costs` as a tensor, (triplets,), int64."""
        key = ("costs", 0, 0, device)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self.costs, device=device, dtype=torch.int64)
        return self._on_device[key]

    def sum_of_columns(self, products: Sequence[Tensor], device: torch.device) -> Tensor:
        """Column sums of one (width_out, r) matrix for each layer, (triplets,), float32 on ``device``.

        Example:
            >>> layout = TripletLayout(ranks=(2, 1), widths_in=(3, 3), widths_out=(4, 4))
            >>> layout.sum_of_columns([torch.ones(4, 2), torch.zeros(4, 1)], torch.device("cpu"))
            tensor([4., 4., 0.])
        """
        total = torch.zeros(self.triplets, device=device)
        layers: dict[tuple[int, int], list[int]] = {}
        for layer, shape in enumerate(zip(self.ranks, self.widths_out, strict=True)):
            layers.setdefault(shape, []).append(layer)
        for (rank, width), members in layers.items():
            block = torch.stack([products[layer].to(device, torch.float32) for layer in members])
            total.index_copy_(0, self._triplets_of(("B", rank, width), device), block.sum(1).flatten())
        return total

    def mean_per_triplet(self, elements: Tensor) -> Tensor:
        """Sum over A, E and B of the mean element of each triplet: (elements,) -> (triplets,)."""
        total = elements.new_zeros(self.triplets)
        for (kind, rank, width), (starts, _) in self._blocks.items():
            size = rank * width
            if not size:
                continue
            block = torch.stack([elements[start : start + size] for start in starts])
            means = (
                block.view(-1, width, rank).mean(1) if kind == "B" else block.view(-1, rank, width).mean(2)
            )
            total.index_add_(0, self._triplets_of((kind, rank, width), elements.device), means.flatten())
        return total

    def _triplets_of(self, block: tuple[str, int, int], device: torch.device) -> Tensor:
        key = (*block, device)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self._blocks[block][1], device=device, dtype=torch.int64)
        return self._on_device[key]


def flatten(matrices: Sequence[Tensor], device: torch.device) -> Tensor:
    """Lay matrices end to end as one float32 vector on ``device``."""
    return torch.cat(
        [matrix.detach().reshape(-1).to(device=device, dtype=torch.float32) for matrix in matrices]
    )


def update_scores(
    sensitivity: Tensor,
    uncertainty: Tensor,
    importance: Tensor,
    beta1: float,
    beta2: float,
    known: Tensor | None = None,
) -> Tensor:
    """Move the running averages on by one optimizer step, in place.

    If any importance is NaN or infinite the whole step is left out, so that one bad batch can't spoil the scores.

    Args:
        sensitivity: running mean of the importance, (elements,), float32.
        uncertainty: running mean of its deviation, (elements,), float32.
        importance: weight times gradient, of either sign, (elements,), float32; it is overwritten.
        beta1: smoothing of the sensitivity, in (0, 1).
        beta2: smoothing of the uncertainty, in (0, 1).
        known: (elements,), bool; where False there was no gradient and the averages stay. None: all known.

    Returns:
        A 0-dim bool tensor: whether the step counted.

    Example:
        >>> s, u = torch.zeros(1), torch.zeros(1)
        >>> update_scores(s, u, torch.tensor([2.0]) * torch.tensor([-1.0]), beta1=0.75, beta2=0.5)
        tensor(True)
        >>> s, u
        (tensor([0.5000]), tensor([0.7500]))
        >>> update_scores(s, u, torch.tensor([torch.nan]), beta1=0.75, beta2=0.5), s
        (tensor(False), tensor([0.5000]))
    """
    importance.abs_()
    counted = importance.sum().isfinite()
    importance.masked_fill_(~counted, 0.0)  # NaN would get through a weight of 0
    moves = counted if known is None else counted & known
    sensitivity.lerp_(importance, torch.where(moves, 1 - beta1, 0.0).to(sensitivity.dtype))
    uncertainty.lerp_(
        importance.sub_(sensitivity).abs_(), torch.where(moves, 1 - beta2, 0.0).to(uncertainty.dtype)
    )
    return counted


def triplet_scores(layout: TripletLayout, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
    """One score per triplet, (triplets,), from the running averages, (elements,)."""
    return layout.mean_per_triplet(sensitivity * uncertainty)
