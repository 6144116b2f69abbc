"""The positions of all layers' triplets in flat vectors.

A step on flat vectors takes few operations, however many layers there are. All computation stays on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TripletLayout:
    """The positions of all layers' triplets in flat vectors.

    The flat *element* vector holds all A, then all E, then all B, in layer order. The flat *triplet* vector holds
    each layer's triplets in layer order.

    Args:
        ranks: number of triplets r of every layer.
        widths_in: number of columns of every A, which is (r, width_in).
        widths_out: number of rows of every B, which is (width_out, r).
        blocks: number of matrices in every layer, each of which has its own rank. A layer's triplets lie block by
            block, equally many in each. None: one block in each layer.

    Example:
        >>> layout = TripletLayout(ranks=(2, 1), widths_in=(3, 3), widths_out=(4, 4))
        >>> layout.triplets, layout.elements
        (3, 24)
    """

    ranks: tuple[int, ...]
    widths_in: tuple[int, ...]
    widths_out: tuple[int, ...]
    blocks: tuple[int, ...] | None = None
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

    @functools.cached_property
    def triplets(self) -> int:
        """The number of triplets of all layers."""
        return sum(self.ranks)

    @property
    def elements(self) -> int:
        """The number of elements of all A, E and B."""
        widths = zip(self.ranks, self.widths_in, self.widths_out, strict=True)
        return sum(rank * (width_in + 1 + width_out) for rank, width_in, width_out in widths)

    @functools.cached_property
    def block_counts(self) -> tuple[int, ...]:
        """The number of blocks of every layer: ``blocks``, or 1 for each layer."""
        return self.blocks or (1,) * len(self.ranks)

    @functools.cached_property
    def block_ranks(self) -> tuple[int, ...]:
        """The number of triplets of every block, layer by layer.

        Example:
            >>> TripletLayout(ranks=(2, 6), widths_in=(3, 3), widths_out=(4, 4), blocks=(1, 3)).block_ranks
            (2, 2, 2, 2)
        """
        return tuple(
            rank // n for rank, n in zip(self.ranks, self.block_counts, strict=True) for _ in range(n)
        )

    @functools.cached_property
    def block_costs(self) -> list[int]:
        """The parameters of A and B that one rank of each block has, layer by layer.

        Example:
            >>> TripletLayout(ranks=(2, 6), widths_in=(3, 3), widths_out=(4, 5), blocks=(1, 3)).block_costs
            [7, 8, 8, 8]
        """
        widths = zip(self.block_counts, self.widths_in, self.widths_out, strict=True)
        return [width_in + width_out for count, width_in, width_out in widths for _ in range(count)]

    def round_robin(self) -> list[int]:
        """All triplet numbers: first the first triplet of every block, then the second of every block, and so on."""
        keyed, start = [], 0
        for block, rank in enumerate(self.block_ranks):
            keyed += [(index, block, start + index) for index in range(rank)]
            start += rank
        return [triplet for _, _, triplet in sorted(keyed)]

    @functools.cached_property
    def costs(self) -> list[int]:
        """The parameters of A and B that each triplet has, in triplet order.

        Example:
            >>> TripletLayout(ranks=(2, 1), widths_in=(3, 5), widths_out=(4, 4)).costs
            [7, 7, 9]
        """
        of_blocks = zip(self.block_costs, self.block_ranks, strict=True)
        return [cost for cost, rank in of_blocks for _ in range(rank)]

    @functools.cached_property
    def cost(self) -> int:
        """The parameters of A and B of all triplets together.

        Example:
            >>> TripletLayout(ranks=(2, 1), widths_in=(3, 5), widths_out=(4, 4)).cost
            23
        """
        return sum(self.costs)

    def target(self, target_r: float, counts_parameters: bool) -> int:
        """The number of triplets at an average rank of ``target_r`` per block, at most the number of all triplets.

        Args:
            target_r: average rank per block, greater than 0.
            counts_parameters: whether the budget counts parameters of A and B. All triplets then stay if they have no
                more parameters than that many triplets of average size. This can be so after a run that kept many
                narrow triplets.

        Example:
            >>> layout = TripletLayout(ranks=(4, 8), widths_in=(3, 3), widths_out=(4, 4))
            >>> layout.target(2, True), layout.target(9, True)
            (4, 12)
        """
        blocks = len(self.block_ranks)
        target = round(target_r * blocks)
        if counts_parameters and self.cost * blocks <= target * self.parameters_of_rank_one:
            return self.triplets
        return min(target, self.triplets)

    def refuse_no_rank(self, target_r: float) -> None:
        """Refuse an average rank per block that leaves no triplet.

        Args:
            target_r: average rank per block, greater than 0.

        Raises:
            ValueError: ``target_r`` leaves no rank at all.
        """
        blocks = len(self.block_ranks)
        if round(target_r * blocks) < 1:
            raise ValueError(
                f"`target_r`={target_r:g} leaves no rank at all for {blocks} layers: set it to at least "
                f"{1 / blocks:.3g}."
            )

    def without(self, left_out: Sequence[bool], target_r: float) -> tuple[int, int]:
        """The triplets of all layers but some: their number at the start, and at an average rank of ``target_r``.

        Args:
            left_out: for every layer, whether it is left out.
            target_r: average rank per block, greater than 0.

        Example:
            >>> TripletLayout(ranks=(4, 8), widths_in=(3, 3), widths_out=(4, 4)).without([True, False], 2)
            (8, 2)
        """
        others = [number for number, left in enumerate(left_out) if not left]
        initial = sum(self.ranks[number] for number in others)
        blocks = sum(self.block_counts[number] for number in others)
        return initial, min(round(target_r * blocks), initial)

    def parameters_per_rank(self, device: torch.device) -> Tensor:
        """The parameters of A and B that each triplet has, (triplets,), int64."""
        key = ("costs", 0, 0, device)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self.costs, device=device, dtype=torch.int64)
        return self._on_device[key]

    @functools.cached_property
    def parameters_of_rank_one(self) -> int:
        """The parameters of A and B at rank 1 in every block. The average rank is measured in this unit.

        Layers without triplets count, too, so a run that was saved and loaded keeps its average rank.

        Example:
            >>> TripletLayout(ranks=(2, 0), widths_in=(3, 5), widths_out=(4, 4)).parameters_of_rank_one
            16
        """
        return sum(self.block_costs)

    def mean_per_triplet(self, elements: Tensor) -> Tensor:
        """Sum the mean element of each triplet in A, E and B: (elements,) -> (triplets,)."""
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
