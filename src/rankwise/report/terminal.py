"""Ranks and budgets drawn with characters in a terminal. They can be read without colours, too."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from rankwise.method.schedule import BudgetSchedule, Phase
from rankwise.report.grid import RankGrid, ink_on, largest_rank, rank_colour, rank_grids, short_kinds
from rankwise.run.summary import LayerRank, RankSummary, shorten

try:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text
except ImportError as error:
    raise ImportError('Pictures in the terminal need rich: pip install "rankwise[report]"') from error

_PHASE_STYLES = {Phase.WARMUP: "yellow", Phase.PRUNING: "magenta", Phase.FINAL: "green"}
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_CHART_HEIGHT = 6
_CHART_WIDTH = 72  # columns at most
_CELL = 9  # columns per cell of the picture, at most


def budget_chart(schedule: BudgetSchedule, initial: int, target: int) -> _BudgetChart:
    """A chart of the budget over the steps of a run, with its phases marked.

    Args:
        schedule: the schedule of the budget.
        initial: the budget at the start: the sum of all initial ranks.
        target: the budget at the end.

    Example:
        >>> from rich.console import Console
        >>> schedule = BudgetSchedule(tinit=200, tfinal=500, total_step=3000, deltaT=10)
        >>> Console(width=60).print(budget_chart(schedule, initial=144, target=96))  # doctest: +SKIP
    """
    return _BudgetChart(schedule, initial, target)


class _BudgetChart:
    def __init__(self, schedule: BudgetSchedule, initial: int, target: int) -> None:
        self.schedule = schedule
        self.initial = initial
        self.target = target

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        margin = max(len(f"{self.initial:,}"), len(f"{self.target:,}"), len("budget")) + 1
        width = max(12, min(_CHART_WIDTH, options.max_width) - margin - 1)
        steps = [1 + round(column * (self.schedule.total_step - 1) / (width - 1)) for column in range(width)]
        yield from self._bars(steps, margin)
        yield self._axis(steps, margin)
        yield self._ends(width, margin)
        yield from self._phases(margin)

    def _bars(self, steps: list[int], margin: int) -> Iterator[Text]:
        budgets = [self.schedule.budget(step, self.initial, self.target) for step in steps]
        levels = [round(8 * _CHART_HEIGHT * budget / max(self.initial, 1)) for budget in budgets]
        labels = dict.fromkeys(range(_CHART_HEIGHT), "")
        target_row = _CHART_HEIGHT - math.ceil(_CHART_HEIGHT * self.target / max(self.initial, 1))
        labels[min(target_row, _CHART_HEIGHT - 1)] = f"{self.target:,}"
        labels[0] = f"{self.initial:,}"
        for row in range(_CHART_HEIGHT):
            floor = 8 * (_CHART_HEIGHT - 1 - row)
            line = Text(f"{labels[row]:>{margin}}│", style="dim", no_wrap=True)
            for step, level in zip(steps, levels, strict=True):
                style = f"not dim {_PHASE_STYLES[self.schedule.phase(step)]}"
                line.append(_EIGHTHS[min(max(level - floor, 0), 8)], style=style)
            yield line

    def _axis(self, steps: list[int], margin: int) -> Text:
        """The line below the bars, which labels each phase: ``└─ warm-up ─┴──── pruning ────┴─ final ─``."""
        line = Text(f"{'budget':>{margin}}└", style="dim", no_wrap=True)
        phases = [self.schedule.phase(step) for step in steps]
        for phase in Phase:
            count = phases.count(phase)
            label = f" {phase} " if len(str(phase)) + 4 <= count else ""
            end = "┴" if count and phase is not Phase.FINAL and phase in phases else ""
            line.append(
                f"{label:─^{count - len(end)}}{end}" if count else "", f"not dim {_PHASE_STYLES[phase]}"
            )
        return line

    def _ends(self, width: int, margin: int) -> Text:
        last = f"step {self.schedule.total_step:,}"
        return Text(f"{'':{margin}} 1{last:>{width - 1}}", style="dim", no_wrap=True)

    def _phases(self, margin: int) -> Iterator[Text]:
        """One line for each phase that has steps: the steps, and what happens to the budget."""
        schedule = self.schedule
        every = "every step" if schedule.deltaT == 1 else f"every {schedule.deltaT:,} steps"
        falls = f"{self.initial:,} → {self.target:,}, chosen again {every}"
        fixed = f"{self.initial:,}, nothing to cut"
        said = {
            Phase.WARMUP: f"{self.initial:,}, every rank trains",
            Phase.PRUNING: falls if self.target < self.initial else fixed,
            Phase.FINAL: f"{self.target:,}, the choice is fixed",
        }
        for phase, (first, last) in schedule.phases().items():
            span = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
            line = Text(" " * (margin + 1)).append("■ ", _PHASE_STYLES[phase])
            yield line.append(f"{phase!s:<8}", "bold").append(f" {span}: {said[phase]}")


def rank_table(summary: RankSummary) -> _RankTable:
    """A table with a bar for each layer. Paths too long for the terminal lose their common start, then their middle.

    Args:
        summary: the ranks.
    """
    return _RankTable(summary)


class _RankTable:
    """The lines of ``RankSummary.to_lines``, in colours."""

    def __init__(self, summary: RankSummary) -> None:
        self.summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head, *lines, totals = self.summary.to_lines(options.max_width)
        largest = largest_rank(self.summary.layers)
        yield Text(head, "bold", no_wrap=True)
        for line, layer in zip(lines, self.summary.layers, strict=True):
            text = Text(line, "" if layer.rank else "dim", no_wrap=True)
            # The darkest colours are lost on black.
            red, green, blue = rank_colour(max(layer.rank, largest // 3), largest)
            text.highlight_regex("█+", f"rgb({red},{green},{blue})")
            text.highlight_regex("░+", "dim")
            yield text
        yield Text(totals, style="dim")


def rank_picture(summary: RankSummary) -> _RankPicture:
    """A picture of each layer's rank: block numbers down, kinds of module across, coloured by rank.

    Layers at rank 0 are shaded instead of coloured. Stacks (encoder, decoder) follow each other. Layers outside every
    stack come last. A stack too wide for the terminal is split into several pieces.

    Args:
        summary: the ranks.
    """
    return _RankPicture(summary)


class _RankPicture:
    def __init__(self, summary: RankSummary) -> None:
        self.summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        largest = largest_rank(self.summary.layers)
        grids = rank_grids(self.summary.layers)
        for grid in grids:
            yield from _grid_lines(grid, largest, options.max_width)
            yield Text("")
        if grids:
            yield _legend(largest, any(layer.rank == 0 for layer in self.summary.layers))


def _grid_lines(grid: RankGrid, largest: int, width: int) -> Iterator[Text]:
    cell = len(str(largest)) + 2
    label = min(max(len(row) for row in grid.rows), max(8, width - cell - 3))
    fit = max(1, (width - label - 2) // (cell + 1))
    pieces = math.ceil(len(grid.columns) / fit)
    each = math.ceil(len(grid.columns) / pieces)
    titles = short_kinds(grid.columns)
    for start in range(0, len(grid.columns), each):
        columns = range(start, min(start + each, len(grid.columns)))
        widest = max(max(map(len, titles[column].split("."))) for column in columns)
        wide = max(cell, min(widest, _CELL, (width - label - 2) // len(columns) - 1))
        yield Text(grid.title, style="bold")
        yield from _heading_lines([titles[column] for column in columns], label, wide)
        for row, name in enumerate(grid.rows):
            line = Text(f"{shorten(name, label):>{label}}  ", no_wrap=True)
            if grid.loose:
                line = Text(f"{shorten(name, label):<{label}}  ", no_wrap=True)
            for column in columns:
                line.append(*_cell(grid.cells.get((row, column)), wide, largest)).append(" ")
            yield line


def _heading_lines(titles: list[str], label: int, width: int) -> Iterator[Text]:
    if titles == [""]:
        return
    wrapped = [_wrap(title, width) for title in titles]
    height = max(map(len, wrapped))
    for row in range(height):
        parts = (lines[row - height + len(lines)] if row >= height - len(lines) else "" for lines in wrapped)
        yield Text(
            " " * (label + 2) + " ".join(f"{part:^{width}}" for part in parts), style="dim", no_wrap=True
        )


def _wrap(title: str, width: int) -> list[str]:
    """Break a kind into lines: at dots, then at underscores and capitals, and anywhere if necessary.

    Example:
        >>> _wrap("encoder_attn.q_proj", 8), _wrap("EncDecAttention.q", 9)
        (['encoder', '_attn', 'q_proj'], ['EncDec', 'Attention', 'q'])
    """
    lines: list[str] = []
    for part in title.split("."):
        line = ""
        for piece in re.findall(r"_*[A-Z]*[^A-Z_]*", part):
            if len(line) + len(piece) > width and line:
                lines.append(line)
                line = ""
            line += piece
            while len(line) > width:
                lines.append(f"{line[: width - 1]}-")
                line = line[width - 1 :]
        lines.append(line)
    return [line for line in lines if line]


def _cell(layer: LayerRank | None, width: int, largest: int) -> tuple[str, str]:
    if layer is None:
        return " " * width, ""
    if layer.rank == 0:
        return f"{' 0 ' if width > 4 else '0':░^{width}}", "bright_black"
    colour = rank_colour(layer.rank, largest)
    red, green, blue = colour
    # by name they would be the terminal's own colours
    ink = "#000000" if ink_on(colour) == "black" else "#ffffff"
    return f"{layer.rank:^{width}}", f"{ink} on rgb({red},{green},{blue})"


def _legend(largest: int, empty: bool) -> Text:
    line = Text("rank ")
    line.append(*_cell(LayerRank("", 0, largest, 0.0, 0), 3, largest)).append(" ")
    marks = sorted({1 + round(step * (largest - 1) / 5) for step in range(6)})
    for rank in marks:
        line.append(*_cell(LayerRank("", rank, largest, 0.0, 0), len(str(rank)) + 2, largest))
    return line.append("  (0: nothing is added to the base layer)" if empty else "", "dim")
