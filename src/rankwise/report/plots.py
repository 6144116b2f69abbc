"""Ranks as image files: a heat map of the final ranks, and a chart of the ranks over the steps.

The file's extension selects the format: ``.png``, ``.svg`` or ``.pdf``. No window is opened, and pyplot's global state
stays unchanged.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.files.atomic import write_file
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
_WIDEST = 30  # columns of panels side by side, before the next line begins
_LARGEST = 24.0  # longest side of a picture in inches; with more cells, they shrink and lose their numbers
_MOST_COLUMNS = 1500  # records drawn in a history


def rank_heatmap(
    ranks: RankSummary | Mapping[str, int], path: str | os.PathLike[str], title: str = "Rank of each layer"
) -> None:
    """Draw the final ranks: block numbers down, kinds of module across, one panel for each stack.

    Args:
        ranks: a summary, or a mapping from module paths to ranks.
        path: the file to write.
        title: the picture's heading.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no layers, or matplotlib does not know the file's extension.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rank_heatmap({"layers.0.q_proj": 4, "layers.1.q_proj": 2}, f"{folder}/ranks.png")
        ...     os.listdir(folder)
        ['ranks.png']
    """
    _save(heatmap_figure(ranks, title), path)


def heatmap_figure(ranks: RankSummary | Mapping[str, int], title: str = "Rank of each layer") -> Figure:
    """Return the figure that `rank_heatmap` writes, to show it elsewhere.

    Args:
        ranks: a summary, or a mapping from module paths to ranks.
        title: the picture's heading.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no layers.
    """
    summary = ranks if isinstance(ranks, RankSummary) else _summary_of(ranks)
    if not summary.layers:
        raise ValueError("There are no adapted layers to draw.")
    lines = _lines(rank_grids(summary.layers))
    largest = largest_rank(summary.layers)
    widths = [sum(0.46 * len(grid.columns) + _margin(grid) for grid in line) for line in lines]
    heights = [max(0.32 * len(grid.rows) + _heading_height(grid) for grid in line) for line in lines]
    figure = _figure(max(4.6, max(widths)), sum(heights) + 1.4)
    _heading(figure, title, summary.totals() if isinstance(ranks, RankSummary) else "")
    axes: list[Axes] = []
    for line, part in zip(
        lines, figure.subfigures(len(lines), 1, height_ratios=heights, squeeze=False), strict=True
    ):
        shares = [max(2, len(grid.columns)) for grid in line]
        panels = part[0].subplots(1, len(line), width_ratios=shares, squeeze=False)[0]
        for panel, grid in zip(panels, line, strict=True):
            _draw_grid(panel, grid, largest, max(len(each.rows) for each in line))
            axes.append(panel)
    _scale(figure, axes[-len(lines[-1]) :], largest, any(layer.rank == 0 for layer in summary.layers))
    return figure


def rank_history_plot(
    history: RankHistory, path: str | os.PathLike[str], title: str = "Ranks over the run"
) -> None:
    """Draw the budget over the steps, and below it every layer's rank.

    Each layer is a row. Rows are grouped by kind of module and sorted from the first block to the last.

    Args:
        history: the ranks that training recorded.
        path: the file to write.
        title: the picture's heading.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history is empty, or matplotlib does not know the file's extension.

    Example:
        >>> import os, tempfile
        >>> history = RankHistory(["layers.0.q_proj", "layers.1.q_proj"])
        >>> history.record(0, 8, [4, 4])
        >>> history.record(10, 6, [4, 2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rank_history_plot(history, f"{folder}/history.png")
        ...     os.listdir(folder)
        ['history.png']
    """
    records = _thinned(history.records)
    if not records or not history.layers:
        raise ValueError("The rank history is empty: there is nothing to draw.")
    groups = _groups(history.layers)
    rows = max(min(0.3 * len(history.layers), 5.5), 0.12 * len(groups), 0.6)
    figure = _figure(10.0, rows + 3.4)
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, rows])
    edges = _edges(records)
    largest = max(max(record.ranks) for record in records) or 1
    _draw_budget(top, records, edges)
    _draw_history(main, groups, records, edges, largest)
    _heading(
        figure,
        title,
        f"{len(history.layers):,} layers, rank {records[0].budget:,} → {sum(records[-1].ranks):,}",
    )
    _scale(figure, [main], largest, any(0 in record.ranks for record in records))
    _save(figure, path)


def _lines(grids: list[RankGrid]) -> list[list[RankGrid]]:
    """Arrange the grids side by side, on several lines if necessary."""
    lines: list[list[RankGrid]] = [[]]
    for grid in grids:
        if lines[-1] and sum(len(each.columns) + 3 for each in lines[-1]) + len(grid.columns) > _WIDEST:
            lines.append([])
        lines[-1].append(grid)
    return lines


def _margin(grid: RankGrid) -> float:
    """Estimate the inches that row labels and the slanted last heading take; matplotlib's layout measures them."""
    return 0.085 * min(40, max(map(len, grid.rows))) + 0.05 * len(short_kinds(grid.columns)[-1]) + 0.4


def _heading_height(grid: RankGrid) -> float:
    """Estimate the inches that the title and the slanted headings take."""
    return 0.05 * max(map(len, short_kinds(grid.columns))) + 0.6


def _draw_grid(axes: Axes, grid: RankGrid, largest: int, tall: int) -> None:
    """Draw one panel on an axis of ``tall`` rows, so that all panels on a line have cells of one height."""
    down, across = len(grid.rows), len(grid.columns)
    cells = [
        [
            grid.cells[row, column].rank if (row, column) in grid.cells else math.nan
            for column in range(across)
        ]
        for row in range(down)
    ]
    small = across > _LARGEST / 0.2 or down > _LARGEST / 0.16
    edge: dict[str, Any] = {} if small else {"edgecolor": "white", "linewidth": 1.2}
    axes.pcolormesh(cells, **_colours(largest), **edge)
    if not small:
        for (row, column), layer in grid.cells.items():
            ink = ink_on(rank_colour(layer.rank, largest)) if layer.rank else _INK
            where: dict[str, Any] = {"ha": "center", "va": "center", "size": 8, "color": ink}
            axes.text(column + 0.5, row + 0.52, str(layer.rank), **where)
    axes.set_ylim(tall, 0)
    every = max(1, -(-down // 100))
    axes.set_yticks(
        [row + 0.5 for row in range(0, down, every)], [shorten(row, 40) for row in grid.rows[::every]]
    )
    axes.xaxis.tick_top()
    if grid.loose:
        axes.set_xticks([])
    else:
        axes.set_xticks([column + 0.5 for column in range(across)], short_kinds(grid.columns))
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="left", rotation_mode="anchor")
    _quiet(axes)
    axes.set_title(grid.title, loc="left", weight="bold", size=10, color=_INK)


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
    for at, budget, align in ((edges[0], budgets[0], "left"), (edges[-1], budgets[-1], "right"))[
        : len(budgets)
    ]:
        axes.annotate(
            f"{budget:,}", (at, budget), (0, 3), textcoords="offset points", size=9, color=_INK, ha=align
        )


def _draw_history(
    axes: Axes,
    groups: list[tuple[str, list[int]]],
    records: list[RankRecord],
    edges: list[float],
    largest: int,
) -> None:
    """Draw a band of rows for each group, with white lines between the bands."""
    from matplotlib.ticker import MaxNLocator

    order = [index for _, members in groups for index in members]
    rows = [[record.ranks[index] for record in records] for index in order]
    axes.pcolormesh(edges, range(len(order) + 1), rows, **_colours(largest))
    ticks, y = [], 0
    for _, members in groups:
        ticks.append(y + len(members) / 2)
        y += len(members)
        axes.axhline(y, color="white", linewidth=2)
    axes.set_ylim(len(order), 0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_yticks(ticks, [shorten(name, 40) for name, _ in groups])
    _quiet(axes)
    axes.tick_params(axis="x", length=3, color="#bbbbbb")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimizer step", color=_INK, size=9)


def _groups(layers: list[str]) -> list[tuple[str, list[int]]]:
    """Group the layers' indices by stack and kind, in drawing order, with a name for each group."""
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
    """Short names for stacks: the parts in which their paths differ.

    Example:
        >>> _stack_names(["model.encoder.layers", "model.decoder.layers"])
        {'model.encoder.layers': 'encoder', 'model.decoder.layers': 'decoder'}
    """
    split = [stack.split(".") for stack in stacks if stack]
    shared = set.intersection(*map(set, split)) if len(split) > 1 else set()
    return {stack: ".".join(p for p in stack.split(".") if p not in shared) or stack for stack in stacks}


def _thinned(records: list[RankRecord]) -> list[RankRecord]:
    """At most ``_MOST_COLUMNS`` of the records, evenly spaced, including the first and the last."""
    if len(records) <= _MOST_COLUMNS:
        return records
    last = len(records) - 1
    return [records[round(column * last / (_MOST_COLUMNS - 1))] for column in range(_MOST_COLUMNS)]


def _edges(records: list[RankRecord]) -> list[float]:
    """The step at which each record begins to apply, and an end for the last one, which has none."""
    steps: list[float] = [record.step for record in records]
    return [*steps, steps[-1] + max(1.0, 0.04 * (steps[-1] - steps[0]))]


def _summary_of(ranks: Mapping[str, int]) -> RankSummary:
    largest = max(ranks.values(), default=0)
    layers = [LayerRank(path, rank, largest, math.nan, 0) for path, rank in ranks.items()]
    return RankSummary(layers, budget=largest * len(layers))


def _colours(largest: int) -> dict[str, Any]:
    """One colour for each rank from 0 to ``largest``, as keyword arguments for matplotlib."""
    from matplotlib.colors import ListedColormap, Normalize

    ranks = [tuple(part / 255 for part in rank_colour(rank, largest)) for rank in range(1, largest + 1)]
    return {"cmap": ListedColormap([_EMPTY, *ranks]), "norm": Normalize(-0.5, largest + 0.5)}


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "rankwise[report]"') from error
    size = (min(width, _LARGEST), min(height, _LARGEST))
    figure = Figure(figsize=size, facecolor="white", layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    return figure


def _quiet(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=_INK, pad=3, labelsize=9)


def _heading(figure: Figure, title: str, below: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", size=14, weight="bold", color=_INK)
    if below:
        figure.supxlabel(below, x=0.01, ha="left", size=9.5, color=_MUTED)


def _scale(figure: Figure, axes: Sequence[Axes], largest: int, zero: bool) -> None:
    """Draw the colour scale below the last panels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import MaxNLocator

    said = "rank" + ("  (0: nothing is added to the base layer)" if zero else "")
    where: dict[str, Any] = {"location": "bottom", "aspect": 40, "shrink": 0.9, "pad": 0.03}
    bar = axes[0].figure.colorbar(ScalarMappable(**_colours(largest)), ax=list(axes), **where)
    bar.ax.xaxis.set_major_locator(MaxNLocator(min(largest, 12), integer=True))
    bar.set_label(said, size=8.5, color=_MUTED)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5, colors=_INK)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    # the line below a narrow grid is wider than the grid
    write_figure(figure, path, bbox_inches="tight", pad_inches=0.1)


def write_figure(figure: Figure, path: str | os.PathLike[str], **options: Any) -> None:
    """Write a figure as a file: whole, or not at all.

    Args:
        figure: the figure.
        path: the file to write. Its extension selects the format; without one, it is ``.png``.
        options: options of matplotlib's ``savefig``.

    Raises:
        ValueError: matplotlib does not know the file's extension.
        OSError: the file could not be written. An old file has not changed then.
    """
    place = Path(path) if Path(path).suffix else Path(f"{path}.png")
    content = io.BytesIO()
    figure.savefig(content, format=place.suffix[1:], **options)
    write_file(place, content.getvalue())
