"""Ranks as pictures in files: a heat map of where they ended, and how they got there over the steps.

The file's ending picks the format: ``.png``, ``.svg``, ``.pdf``. Nothing is shown on a screen, and pyplot's
global state is left alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rankwise.report.grid import (
    RankGrid,
    grid_position,
    ink_on,
    kind_order,
    largest_rank,
    rank_colour,
    rank_grids,
    short_kinds,
)
from rankwise.run.history import RankHistory, RankRecord
from rankwise.run.summary import LayerRank, RankSummary, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#222222"
_MUTED = "#6b6b6b"
_EMPTY = "#e4e4e4"  # rank 0
_HATCH = "#b4b4b4"
_GAP = 0.45  # inches between panels
_WIDEST = 15.0  # inches of panels side by side before they go on below
_MOST_COLUMNS = 1500  # moments drawn in a history


def rank_heatmap(
    ranks: RankSummary | Mapping[str, int], path: str | os.PathLike[str], title: str = "Rank of each layer"
) -> None:
    """Draw where the ranks ended: block number down, kind of module across, a panel for each stack.

    Args:
        ranks: a summary, or the rank of each module path.
        path: the file to write.
        title: the heading.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no layers, or matplotlib does not know the file's ending.
    """
    summary = ranks if isinstance(ranks, RankSummary) else _summary_of(ranks)
    if not summary.layers:
        raise ValueError("There are no adapted layers to draw.")
    grids = rank_grids(summary.layers)
    largest = largest_rank(summary.layers)
    panels = [_Panel(grid) for grid in grids]
    width, height = _place(panels)
    below, above = 0.75, 0.65
    width = max(width, 4.6)
    figure = _figure(width, height + below + above)
    for panel in panels:
        left, top = panel.left / width, (panel.top + above) / (height + below + above)
        box = (left, 1 - top - panel.inner[1] / figure.get_figheight(), panel.inner[0] / width)
        axes = figure.add_axes((*box, panel.inner[1] / figure.get_figheight()))
        _draw_grid(axes, panel, largest)
    _heading(figure, title, summary.totals() if isinstance(ranks, RankSummary) else "")
    zero = any(layer.rank == 0 for layer in summary.layers)
    _scale(figure, largest, zero)
    _save(figure, path)


def rank_history_plot(
    history: RankHistory, path: str | os.PathLike[str], title: str = "Ranks over the run"
) -> None:
    """Draw how the ranks got where they are: the budget over the steps, and below it every layer's rank.

    Layers are rows, gathered by kind of module; within a kind they go from the first block down to the last.

    Args:
        history: what training recorded.
        path: the file to write.
        title: the heading.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing is recorded, or matplotlib does not know the file's ending.
    """
    records = _thinned(history.records)
    if not records or not history.layers:
        raise ValueError("The rank history is empty: there is nothing to draw.")
    groups = _groups(history.layers)
    order = [index for _, members in groups for index in members]
    row = min(0.3, max(0.045, 5.5 / len(order)))
    rows = max(row * len(order) + 0.1 * (len(groups) - 1), 0.6)
    budget, between, above, below = 1.5, 0.28, 0.85, 1.25
    figure = _figure(10.0, budget + between + rows + above + below)
    tall = figure.get_figheight()
    left, wide = 0.2, 0.77
    top = figure.add_axes((left, (below + rows + between) / tall, wide, budget / tall))
    main = figure.add_axes((left, below / tall, wide, rows / tall), sharex=top)
    edges = _edges(records)
    _draw_budget(top, records, edges)
    largest = max(max(record.ranks) for record in records) or 1
    _draw_history(main, groups, records, edges, largest, history.layers, row)
    last = records[-1]
    _heading(figure, title, f"{len(order):,} layers, rank {records[0].budget:,} → {sum(last.ranks):,}")
    _scale(figure, largest, any(0 in record.ranks for record in records), hatch="")
    _save(figure, path)


class _Panel:
    """A grid with its place on the page, in inches."""

    def __init__(self, grid: RankGrid) -> None:
        self.grid = grid
        self.titles = short_kinds(grid.columns)
        across, down = len(grid.columns), len(grid.rows)
        self.cell = (min(0.46, max(0.1, 40 / across)), min(0.32, max(0.07, 24 / down)))
        self.rows = [shorten(row, 40) for row in grid.rows]
        self.label = 0.085 * max(map(len, self.rows)) + 0.15
        longest = max(map(len, self.titles))
        self.heading = (0.044 * longest + 0.16 if longest else 0.06) + 0.32
        self.lean = 0.05 * len(self.titles[-1])  # how far the last, slanted heading leans out
        self.inner = (self.cell[0] * across, self.cell[1] * down)
        self.left = self.top = 0.0

    @property
    def width(self) -> float:
        return self.label + max(self.inner[0] + self.lean, 0.085 * len(self.grid.title))


def _place(panels: list[_Panel]) -> tuple[float, float]:
    """Put the panels side by side, on several lines if need be; returns the width and height taken."""
    x = y = width = 0.0
    line: list[_Panel] = []
    for panel in [*panels, None]:
        if line and (panel is None or x + panel.width > _WIDEST):
            heading = max(member.heading for member in line)
            for member in line:
                member.top, member.heading = y + heading, heading
            y += heading + max(member.inner[1] for member in line) + _GAP
            x, line = 0.0, []
        if panel is not None:
            panel.left = x + panel.label
            x += panel.width + _GAP
            width = max(width, x - _GAP)
            line.append(panel)
    return width, y - _GAP


def _draw_grid(axes: Axes, panel: _Panel, largest: int) -> None:
    grid = panel.grid
    down, across = len(grid.rows), len(grid.columns)
    size = 72 * min(panel.cell[1] * 0.45, panel.cell[0] * 0.3)
    for (row, column), layer in grid.cells.items():
        _draw_cell(axes, row, column, layer.rank, largest, size)
    axes.set_xlim(0, across)
    axes.set_ylim(down, 0)
    every = max(1, math.ceil(0.13 / panel.cell[1]))
    ticks = range(0, down, every)
    axes.set_yticks([row + 0.5 for row in ticks], [panel.rows[row] for row in ticks])
    axes.xaxis.tick_top()
    if not grid.loose:
        labels = axes.set_xticks([column + 0.5 for column in range(across)], panel.titles)
        for label in labels:
            label.label2.set(rotation=40, ha="left", rotation_mode="anchor")
    else:
        axes.set_xticks([])
    _quiet(axes)
    axes.tick_params(labelsize=9 if panel.cell[1] > 0.2 else 7.5)
    lift = 72 * (panel.heading - 0.2)
    axes.annotate(
        grid.title,
        (0, 1),
        xytext=(0, lift),
        xycoords="axes fraction",
        textcoords="offset points",
        weight="bold",
        size=10,
        color=_INK,
    )


def _draw_cell(axes: Axes, row: int, column: int, rank: int, largest: int, size: float) -> None:
    from matplotlib.patches import Rectangle

    colour = rank_colour(rank, largest)
    face: Any = tuple(part / 255 for part in colour) if rank else _EMPTY
    line = min(1.2, size / 6)
    if rank == 0:
        axes.add_patch(
            Rectangle((column, row), 1, 1, facecolor=face, edgecolor=_HATCH, hatch="////", linewidth=0)
        )
        face = "none"
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white", linewidth=line))
    if size >= 4:
        ink = ink_on(colour) if rank else _INK
        text = axes.text(
            column + 0.5, row + 0.52, str(rank), ha="center", va="center", size=min(size, 9), color=ink
        )
        if rank == 0:
            text.set_bbox({"facecolor": _EMPTY, "edgecolor": "none", "pad": 0.8})


def _draw_budget(axes: Axes, records: list[RankRecord], edges: list[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    budgets = [record.budget for record in records]
    axes.stairs(budgets, edges, fill=True, color="#d5e3ea")
    axes.stairs(budgets, edges, color="#2c728e", linewidth=1.8, baseline=None)
    axes.set_ylim(0, max(budgets) * 1.12 or 1)
    axes.set_ylabel("budget", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=_MUTED, labelsize=9, labelbottom=False, length=3)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.annotate(
        f"{budgets[0]:,}", (edges[0], budgets[0]), (4, 3), textcoords="offset points", size=9, color=_INK
    )
    if len(budgets) > 1:
        end = (edges[-1], budgets[-1])
        axes.annotate(
            f"{budgets[-1]:,}", end, (-2, 3), textcoords="offset points", size=9, color=_INK, ha="right"
        )


def _draw_history(
    axes: Axes,
    groups: list[tuple[str, list[int]]],
    records: list[RankRecord],
    edges: list[float],
    largest: int,
    layers: list[str],
    row: float,
) -> None:
    """One band of rows for each group, with a little space between bands."""
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    colours = ListedColormap([_EMPTY, *(_rgb(rank, largest) for rank in range(1, largest + 1))])
    space = 0.1 / row
    y = 0.0
    ticks: list[tuple[float, str]] = []
    for name, members in groups:
        rows = [[record.ranks[index] for record in records] for index in members]
        bottoms = [y + line for line in range(len(members) + 1)]
        axes.pcolormesh(edges, bottoms, rows, cmap=colours, vmin=-0.5, vmax=largest + 0.5)
        ticks.append((y + len(members) / 2, name))
        _number_ends(axes, y, [grid_position(layers[index]).layer for index in members], row)
        y += len(members) + space
    axes.set_ylim(y - space, 0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_yticks([at for at, _ in ticks], [shorten(name, 40) for _, name in ticks])
    _quiet(axes)
    axes.tick_params(labelsize=9)
    axes.tick_params(axis="x", length=3, color="#bbbbbb")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimizer step; block numbers at the right", color=_INK, size=9)


def _number_ends(axes: Axes, top: float, numbers: list[int | None], row: float) -> None:
    """Write a band's first and last block number at its right end, if there is room for both."""
    if len(numbers) < 2 or row * len(numbers) < 0.24:
        return
    for number, at, align in ((numbers[0], top, "top"), (numbers[-1], top + len(numbers), "bottom")):
        if number is not None:
            place = (1.006, at)
            axes.text(
                *place, str(number), transform=axes.get_yaxis_transform(), va=align, size=7, color=_MUTED
            )


def _groups(layers: list[str]) -> list[tuple[str, list[int]]]:
    """Indices of the layers by stack and kind, in the order of drawing, with a name for each group."""
    places = [grid_position(layer) for layer in layers]
    stacks = list(dict.fromkeys(place.stack for place in places))
    keys = dict.fromkeys((place.stack, place.kind) for place in places)
    ordered = sorted(keys, key=lambda key: (key[0] == "", stacks.index(key[0]), kind_order(key[1])))
    members: dict[tuple[str, str], list[int]] = {key: [] for key in ordered}
    for index in sorted(range(len(layers)), key=lambda index: places[index].layer or 0):
        members[places[index].stack, places[index].kind].append(index)
    kinds = list(dict.fromkeys(kind for _, kind in ordered))
    short = dict(zip(kinds, short_kinds(kinds), strict=True))
    many = len([stack for stack in stacks if stack]) > 1
    names = _stack_names(stacks)
    return [
        (f"{names[stack]} · {short[kind]}" if many and stack else short[kind], members[stack, kind])
        for stack, kind in ordered
    ]


def _stack_names(stacks: list[str]) -> dict[str, str]:
    """Short names for stacks: the parts of their paths in which they differ.

    Example:
        >>> _stack_names(["model.encoder.layers", "model.decoder.layers"])
        {'model.encoder.layers': 'encoder', 'model.decoder.layers': 'decoder'}
    """
    split = [stack.split(".") for stack in stacks if stack]
    shared = set.intersection(*map(set, split)) if len(split) > 1 else set()
    return {stack: ".".join(p for p in stack.split(".") if p not in shared) or stack for stack in stacks}


def _thinned(records: list[RankRecord]) -> list[RankRecord]:
    """At most ``_MOST_COLUMNS`` of the records, evenly, with the first and the last."""
    if len(records) <= _MOST_COLUMNS:
        return records
    last = len(records) - 1
    return [records[round(column * last / (_MOST_COLUMNS - 1))] for column in range(_MOST_COLUMNS)]


def _edges(records: list[RankRecord]) -> list[float]:
    """Where each record begins to hold, and an end for the last one, which holds on."""
    steps: list[float] = [record.step for record in records]
    return [*steps, steps[-1] + max(1.0, 0.04 * (steps[-1] - steps[0]))]


def _summary_of(ranks: Mapping[str, int]) -> RankSummary:
    largest = max(ranks.values(), default=0)
    layers = [LayerRank(path, rank, largest, math.nan, 0) for path, rank in ranks.items()]
    return RankSummary(layers, budget=largest * len(layers))


def _rgb(rank: int, largest: int) -> tuple[float, float, float]:
    red, green, blue = rank_colour(rank, largest)
    return red / 255, green / 255, blue / 255


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "rankwise[report]"') from error
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _quiet(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=_INK, pad=3)


def _heading(figure: Figure, title: str, below: str) -> None:
    """The title, at the left edge of what is drawn, and a line of facts below it."""
    tall = figure.get_figheight()
    figure.text(0, 1 - 0.02 / tall, title, size=14, weight="bold", color=_INK, va="top")
    figure.text(0, 1 - 0.33 / tall, below, size=9.5, color=_MUTED, va="top")


def _scale(figure: Figure, largest: int, zero: bool, hatch: str = "////") -> None:
    """The key to the colours, at the foot: rank 0 apart, then 1 to the largest."""
    wide, tall = figure.get_size_inches()
    axes = figure.add_axes((0, 0.22 / tall, min(1.0, 4.0 / wide), 0.16 / tall))
    step = 4.0 / (largest + 1.4)
    axes.set_xlim(0, largest + 1.4)
    axes.set_ylim(1, 0)
    from matplotlib.patches import Rectangle

    for rank in range(1, largest + 1):
        axes.add_patch(Rectangle((rank + 0.4, 0), 1, 1, facecolor=_rgb(rank, largest), linewidth=0))
    axes.add_patch(Rectangle((0, 0), 1, 1, facecolor=_EMPTY, edgecolor=_HATCH, hatch=hatch, linewidth=0))
    every = max(1, math.ceil(0.28 / step))
    marks = [rank for rank in range(1, largest + 1) if (largest - rank) % every == 0]
    axes.set_xticks([0.5, *(rank + 0.9 for rank in marks)], ["0", *map(str, marks)])
    _quiet(axes)
    axes.set_yticks([])
    axes.tick_params(labelsize=8.5, pad=2)
    axes.annotate(
        "rank" + ("  (0: pruned away, nothing added to the base layer)" if zero else ""),
        (0, 1),
        xytext=(0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        size=8.5,
        color=_MUTED,
    )


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.25)
