"""The factors of all layers of a run: one place to read and write them, whichever process holds them.

Every factor is read as a matrix with one row per rank, (ranks, width), block by block, whatever its shape in the layer
(see `FactorPair.rows`). A `Holder` reads and writes the factors wherever they are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.method.layout import TripletLayout
from rankwise.parallel.holder import Holder, Measured, TensorHolder
from rankwise.parallel.sharded import put_back
from rankwise.parallel.zero import ZeroParts, partitioned, shape_of
from rankwise.parallel.zero_holder import ZeroHolder
from rankwise.run.pairs import KEYS, FactorPair, block_names
from rankwise.run.run_tensors import RunTensors


class Factors:
    """The factors of all layers of a run, and the ranks that they keep.

    Factors are numbered kind by kind, in the order of ``keys``, and within a kind layer by layer.

    Args:
        pairs: one pair for each layer, in the model's order.
        tensors: the run's tensors. They must be `created <RunTensors.create>` before ranks are read.
        keys: the kinds of factors: "A" and "B"; the paper's form has "E" before them.
    """

    def __init__(
        self, pairs: Sequence[FactorPair], tensors: RunTensors, keys: tuple[str, ...] = KEYS
    ) -> None:
        self.pairs, self.tensors, self.keys = list(pairs), tensors, keys
        shapes_A = [shape_of(pair.parameter("A")) for pair in pairs]
        shapes_B = [shape_of(pair.parameter("B")) for pair in pairs]
        self.layout = TripletLayout(
            ranks=tuple(shape[0] for shape in shapes_A),
            widths_in=tuple(shape[1:].numel() for shape in shapes_A),
            widths_out=tuple(shape.numel() // max(shape[1], 1) for shape in shapes_B),
            blocks=tuple(pair.blocks for pair in pairs),
        )
        self.shapes = {"A": shapes_A, "B": shapes_B, "E": [torch.Size((s[0], 1)) for s in shapes_A]}
        self._indices: dict[Any, Tensor] = {}
        self._zero_holder: ZeroHolder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_indices": {}, "_zero_holder": None}

    @property
    def names(self) -> list[str]:
        """A name for every block: the layer's path, with the block's index if the layer has several."""
        return [name for pair in self.pairs for name in block_names(pair.path, pair.blocks)]

    # Parameters and their numbers.

    def parameters(self, key: str) -> list[nn.Parameter]:
        """The factors of one kind, in layer order."""
        return [pair.parameter(key) for pair in self.pairs]

    def parameter(self, number: int) -> nn.Parameter:
        """The factor with this number."""
        key, layer = divmod(number, len(self.pairs))
        return self.pairs[layer].parameter(self.keys[key])

    def shape(self, number: int) -> torch.Size:
        """The whole shape that the factor of a number had when the run began."""
        key, layer = divmod(number, len(self.pairs))
        return self.shapes[self.keys[key]][layer]

    def all_parameters(self) -> list[nn.Parameter]:
        """All factors, in the order of their numbers."""
        return [pair.parameter(key) for key in self.keys for pair in self.pairs]

    def numbers(self, key: str) -> range:
        """The numbers of the factors of one kind."""
        first = self.keys.index(key) * len(self.pairs)
        return range(first, first + len(self.pairs))

    def trains(self, key: str) -> list[bool]:
        """For each layer, whether its factor of one kind trains."""
        return [parameter.requires_grad for parameter in self.parameters(key)]

    def base_weights(self) -> set[int]:
        """The ids of the weights that the layers adapt. Weights that are not known are left out."""
        return {id(weight) for pair in self.pairs if (weight := pair.base_weight()) is not None}

    @property
    def holder(self) -> Holder:
        """The object that currently reads and writes the factors."""
        put_back()
        self.zero_parts()
        return self._zero_holder or TensorHolder(self.parameter)

    def zero_parts(self) -> ZeroParts | None:
        """The factors as DeepSpeed ZeRO holds them; None without ZeRO."""
        if self._zero_holder is None and "deepspeed" in sys.modules:
            own = self.all_parameters()
            if any(map(partitioned, own)):
                self._zero_holder = ZeroHolder(ZeroParts(own))
        return None if self._zero_holder is None else self._zero_holder.parts

    # Reading and writing them as rows.

    def rows(self, key: str) -> list[Tensor]:
        """Every layer's factor as rows, (ranks, width), in at least float32. All processes must call it together."""
        found = self.holder.whole(list(self.numbers(key)))
        return [pair.rows(key, wide(each)) for pair, each in zip(self.pairs, found, strict=True)]

    def write_rows(self, key: str, rows: Mapping[int, Tensor]) -> None:
        """Write new values, by layer index, into the factors of some layers."""
        self.holder.write(self._in_place(key, rows))

    def switch_off(self) -> None:
        """Make A and B 0 in all ranks that are not kept."""
        by_layer = self.mask.split(self.layout.ranks)
        for key in KEYS:
            rows = self.rows(key)
            kept = [own.to(each.device)[:, None] for own, each in zip(by_layer, rows, strict=True)]
            self.write_rows(key, {n: torch.where(kept[n], each, 0.0) for n, each in enumerate(rows)})

    def rewrite(
        self,
        key: str,
        layers: Sequence[int],
        held: Mapping[int, Tensor],
        how: Callable[..., dict[int, Tensor]],
    ) -> dict[int, Tensor]:
        """Change values by ``how``, which takes and returns rows by layer index.

        Args:
            key: the kind of factor.
            layers: the layers to change.
            held: values in the shapes of factors, by factor number. Layers without an entry are skipped.
            how: the change.

        Returns:
            The changed values, in the shapes of factors, by factor number.
        """
        numbers = self.numbers(key)
        rows = {n: self.pairs[n].rows(key, wide(held[numbers[n]])) for n in layers if numbers[n] in held}
        return self._in_place(key, how(rows))

    def _in_place(self, key: str, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        numbers, shapes = self.numbers(key), self.shapes[key]
        return {numbers[n]: self.pairs[n].from_rows(key, each, shapes[n]) for n, each in rows.items()}

    @functools.cached_property
    def measured(self) -> list[Measured]:
        """For every layer, the factor that is 0 at the start and carries the update."""
        return [
            Measured(
                self.numbers(pair.starts_at_zero)[n],
                pair.blocks,
                pair.order(pair.starts_at_zero, self.layout.ranks[n]),
            )
            for n, pair in enumerate(self.pairs)
        ]

    # Ranks.

    @property
    def mask(self) -> Tensor:
        """The ranks that the last cut kept, (ranks,), bool."""
        return self.tensors.mask

    def block_ranks(self, mask: Tensor | None = None) -> Tensor:
        """The rank of every block, (blocks,), int64, after the last cut, or by ``mask``, (ranks,), bool."""
        mask = self.mask if mask is None else mask
        counts = torch.zeros(len(self.layout.block_ranks), dtype=torch.int64, device=mask.device)
        return counts.index_add_(0, self._block_of_rank(mask.device), mask.to(torch.int64))

    def average_rank(self) -> float:
        """The average rank after the last cut: a LoRA of that rank has as many parameters. Waits for the device."""
        per_rank = self.layout.parameters_per_rank(self.mask.device)
        return int((per_rank * self.mask).sum()) / max(1, self.layout.parameters_of_rank_one)

    def spread(self, per_block: Tensor) -> Tensor:
        """Repeat one value per block, (blocks,), for each of its ranks, (ranks,)."""
        return per_block[self._block_of_rank(per_block.device)]

    def spread_layers(self, per_layer: Sequence[bool], device: torch.device) -> Tensor:
        """Repeat one value per layer for each of its ranks, (ranks,), bool."""
        repeats = torch.tensor(self.layout.ranks, device=device)
        return torch.tensor(per_layer, dtype=torch.bool, device=device).repeat_interleave(repeats)

    def index(self, name: str, values: Callable[[], list[int]], device: torch.device) -> Tensor:
        """Integers as a tensor on a device. The tensor is made once."""
        if (name, device) not in self._indices:
            self._indices[name, device] = torch.tensor(values(), dtype=torch.int64, device=device)
        return self._indices[name, device]

    def _block_of_rank(self, device: torch.device) -> Tensor:
        def blocks() -> list[int]:
            return [number for number, rank in enumerate(self.layout.block_ranks) for _ in range(rank)]

        return self.index("blocks", blocks, device)

    # The end of a run.

    def narrow(self) -> None:
        """Tell every layer which ranks it keeps, because the choice is final."""
        for pair, kept in zip(self.pairs, self.mask.cpu().split(self.layout.ranks), strict=True):
            pair.narrow(kept)

    def widen(self) -> None:
        """Let every layer use all ranks again, because the choice is open again."""
        for pair in self.pairs:
            pair.widen()


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in at least float32, detached from any graph."""
    return tensor.detach() if tensor.element_size() >= 4 else tensor.detach().float()
