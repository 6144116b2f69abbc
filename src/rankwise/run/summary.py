"""A summary of the ranks: one row for each adapted layer, as a table for people and as data for programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rankwise.run.notebook import summary_html

_WIDTH = 100  # columns of the text table, at most
_BAR, _LEAST_BAR = 24, 8  # columns of a bar: at most, and at least if paths are long
_LEAST_PATH = 16  # columns of a path, at least


@dataclass(frozen=True)
class LayerRank:
    """The rank of one adapted layer.

    Args:
        path: the module's path in the model.
        rank: the number of ranks that are left, 0 to ``init_r``.
        init_r: the number of ranks at the start.
        importance: the worth of the layer's ranks together. In the default form it is ``rank`` times the worth (see
            `rankwise.method.worth`) of a direction of average strength; in the paper's form it is the sum of the ranks'
            scores. It is at least 0, or NaN if nothing can be cut, as in an adapter loaded for inference.
        parameters: the number of parameters in the adapter's tensors at ``rank``.

    Example:
        >>> LayerRank("fc1", rank=1, init_r=4, importance=0.5, parameters=16).rank
        1
    """

    path: str
    rank: int
    init_r: int
    importance: float
    parameters: int


@dataclass(frozen=True)
class RankSummary:
    """The ranks of all adapted layers. Printed, it is a table of at most 100 columns.

    Args:
        layers: one entry for each adapted layer, in the order of the model.
        budget: the sum of all ranks at the start.

    Example:
        >>> layers = [LayerRank("fc1", 4, 4, 0.5, 64), LayerRank("fc2", 1, 4, 0.02, 16)]
        >>> summary = RankSummary(layers, budget=8)
        >>> print(summary)
        layer  rank        importance  parameters
        fc1     4/4  ████         0.5          64
        fc2     1/4  █░░░        0.02          16
        2 layers: rank 5 of 8 (62 %), 80 parameters
        >>> summary.to_dict()["total_rank"]
        5
    """

    layers: list[LayerRank]
    budget: int

    @property
    def total_rank(self) -> int:
        """The sum of all layers' ranks."""
        return sum(layer.rank for layer in self.layers)

    @property
    def parameters(self) -> int:
        """The number of parameters in all layers' adapter tensors."""
        return sum(layer.parameters for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain data for JSON. An unknown importance (NaN) becomes None."""
        return {
            "budget": self.budget,
            "total_rank": self.total_rank,
            "parameters": self.parameters,
            "layers": [
                {
                    "path": layer.path,
                    "rank": layer.rank,
                    "init_r": layer.init_r,
                    "importance": layer.importance if math.isfinite(layer.importance) else None,
                    "parameters": layer.parameters,
                }
                for layer in self.layers
            ],
        }

    def totals(self) -> str:
        """Return the sums in one line.

        Example:
            >>> RankSummary([LayerRank("fc1", 0, 4, 0.0, 0)], budget=4).totals()
            '1 layer: rank 0 of 4 (0 %), 1 layer at rank 0, 0 parameters'
        """
        parts = [f"{_layers(len(self.layers))}: rank {self.total_rank:,} of {self.budget:,}"]
        if self.budget:
            parts[0] += f" ({100 * self.total_rank / self.budget:.0f} %)"
        empty = sum(layer.rank == 0 for layer in self.layers)
        if empty:
            parts.append(f"{_layers(empty)} at rank 0")
        return ", ".join([*parts, f"{self.parameters:,} parameters"])

    def to_lines(self, width: int = _WIDTH) -> list[str]:
        """Return the table's lines: headings, one line for each layer, sums.

        Args:
            width: the number of columns that the table may take. Bars are shortened before paths are cut.
        """
        largest = max((layer.init_r for layer in self.layers), default=0)
        known = any(math.isfinite(layer.importance) for layer in self.layers)
        numbers = [["rank", *(f"{layer.rank}/{layer.init_r}" for layer in self.layers)]]
        if known:
            numbers.append(["importance", *(_importance(layer.importance) for layer in self.layers)])
        numbers.append(["parameters", *(f"{layer.parameters:,}" for layer in self.layers)])
        widths = [max(map(len, column)) for column in numbers]
        room = width - sum(widths) - 2 * (len(widths) + 1)
        longest = max((len(layer.path) for layer in self.layers), default=0)
        bar = min(largest, _BAR)
        bar = max(min(bar, _LEAST_BAR), min(bar, room - longest))
        paths = [
            "layer",
            *paths_that_fit([layer.path for layer in self.layers], max(_LEAST_PATH, room - bar)),
        ]
        bars = ["", *(rank_bar(layer.rank, layer.init_r, largest, bar) for layer in self.layers)]
        (rank, *others), left = numbers, max(map(len, paths))
        lines = [
            "  ".join([path.ljust(left), first.rjust(widths[0]), drawn.ljust(bar)])
            for path, first, drawn in zip(paths, rank, bars, strict=True)
        ]
        for column, wide in zip(others, widths[1:], strict=True):
            lines = [f"{line}  {cell:>{wide}}" for line, cell in zip(lines, column, strict=True)]
        return [*lines, self.totals()]

    def __str__(self) -> str:
        return "\n".join(self.to_lines())

    def _repr_html_(self) -> str:
        """The table as HTML, for notebooks."""
        return summary_html(self.layers, self.totals())


def rank_bar(rank: int, init_r: int, largest: int, width: int = _BAR) -> str:
    """Draw a bar: full blocks for the ranks that are left, light blocks for those that were cut.

    One block is one rank if ``largest`` (the largest initial rank in the table) fits in ``width``. Otherwise the bar is
    scaled. A scaled bar still shows a rank above 0, and the loss of a rank.

    Example:
        >>> rank_bar(3, 8, largest=8)
        '███░░░░░'
        >>> rank_bar(1, 64, largest=64, width=8), rank_bar(63, 64, largest=64, width=8)
        ('█░░░░░░░', '███████░')
    """
    if largest > width:
        length = max(1, round(init_r * width / largest)) if init_r else 0
        full = round(rank * width / largest)
        full = min(max(full, 1), length) if rank else 0
        full = min(full, length - 1) if rank < init_r and length > 1 else full
    else:
        full, length = rank, init_r
    return "█" * full + "░" * (length - full)


def shorten(text: str, width: int) -> str:
    """Shorten ``text`` to ``width`` characters by leaving out its middle. Most of its end is kept.

    Example:
        >>> shorten("model.language_model.layers.11.self_attn.q_proj", 32)
        'model…layers.11.self_attn.q_proj'
    """
    if len(text) <= width:
        return text
    head = max(0, (width - 1) // 6)
    tail = max(0, width - 1 - head)
    return f"{text[:head]}…{text[len(text) - tail :]}"


def paths_that_fit(paths: list[str], width: int) -> list[str]:
    """Shorten module paths to ``width`` characters. First parts that all paths share are dropped first.

    Example:
        >>> paths_that_fit(["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"], width=20)
        ['encoder.layers.0.fc1', 'decoder.layers.0.fc1']
    """
    shorter = list(paths)
    while max(map(len, shorter), default=0) > width:
        firsts = {path.partition(".")[0] for path in shorter}
        rests = [path.partition(".")[2] for path in shorter]
        if len(firsts) > 1 or not all(rest.partition(".")[0].isidentifier() for rest in rests):
            break
        shorter = rests
    return [shorten(path, width) for path in shorter]


def _importance(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _layers(count: int) -> str:
    return f"{count:,} layer" if count == 1 else f"{count:,} layers"
