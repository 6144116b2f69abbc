"""The charts of a report page, as the plain data that Plotly draws.

The page itself sets the colours that depend on its light or dark theme: text, lines and rank 0. This module sets the
colours of the data. They are Okabe and Ito's, which can be told apart with every kind of colour vision. Each colour
also has its own dash pattern.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rankwise.report.grid import (
    RankGrid,
    grid_position,
    ink_on,
    kind_order,
    rank_colour,
    rank_grids,
    short_kinds,
)
from rankwise.report.runs import Run
from rankwise.report.sweeps import Sweep
from rankwise.run.summary import shorten

Figure = dict[str, Any]  # Plotly's form: {"data": [...], "layout": {...}}

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MOST_LINES = 600  # spectra drawn at most, one per layer
_ROW, _LONGEST_LABEL = 24, 24  # height of a heat map's row in pixels; characters per label


def heatmap(run: Run, grid: RankGrid, largest: int, scale: bool) -> tuple[Figure, list[list[int]]]:
    """Draw the ranks of one stack of blocks: block numbers down, kinds of module across.

    Args:
        run: the run whose layers are in ``grid``.
        grid: the stack.
        largest: the end of the colour scale, which all heat maps of a page share.
        scale: whether to draw the colour scale below the map.

    Returns:
        The figure with the last ranks, and a table of layer indices. The table holds for each cell the index of its
        layer in ``run.adapter.layers``, or -1 for no layer. The page uses it to show the ranks of other steps.
    """
    index = {layer.path: number for number, layer in enumerate(run.adapter.layers)}
    rows, columns = range(len(grid.rows)), range(len(grid.columns))
    cells = [[index[grid.cells[r, c].path] if (r, c) in grid.cells else -1 for c in columns] for r in rows]
    ranks = run.records[-1].ranks
    titles = [shorten(title, _LONGEST_LABEL) for title in short_kinds(grid.columns)]
    small = len(grid.columns) > 24 or len(grid.rows) > 64
    row = _ROW if not small else max(3, min(_ROW, 1200 // len(grid.rows)))
    trace = {
        "type": "heatmap",
        "z": [[ranks[cell] if cell >= 0 else None for cell in line] for line in cells],
        "zmin": -0.5,
        "zmax": largest + 0.5,
        "colorscale": colour_scale(largest),
        "xgap": 0 if small else 2,
        "ygap": 0 if small else 2,
        "customdata": [[shorten(f"{r} {c}".strip(), 60) for c in grid.columns] for r in grid.rows]
        if small
        else [[_plain(grid.cells[r, c].path) if (r, c) in grid.cells else "" for c in columns] for r in rows],
        "hovertemplate": "%{customdata}<br>rank %{z}<extra></extra>",
        "hoverongaps": False,
        "texttemplate": "" if small else "%{z}",
        "showscale": scale,
        # Up to this rank the page writes numbers in white; above it, on the lighter colours, in black.
        "meta": {
            "white": max(
                (r for r in range(1, largest + 1) if ink_on(rank_colour(r, largest)) == "white"), default=0
            )
        },
        "colorbar": {
            "orientation": "h",
            "y": 0,
            "yanchor": "top",
            "ypad": 8,
            "thickness": 10,
            "outlinewidth": 0,
            "tickformat": "d",
            "title": {"text": "rank", "side": "bottom"},
        },
    }
    heading = 0 if grid.loose else 12 + 5 * max(len(title) for title in titles)
    layout = {
        "height": row * len(grid.rows) + heading + 20 + (64 if scale else 0),
        "margin": {"l": 8, "r": 8, "t": heading + 6, "b": 70 if scale else 8},
        "xaxis": _ticks([_plain(title) for title in titles], side="top", tickangle=-45)
        if not grid.loose
        else {"visible": False, "fixedrange": True},
        "yaxis": _ticks([_plain(shorten(name, _LONGEST_LABEL)) for name in grid.rows], autorange="reversed"),
    }
    return {"data": [trace], "layout": layout}, cells


def grids_of(run: Run) -> list[RankGrid]:
    """Lay out a run's layers as grids."""
    return rank_grids(run.adapter.summary().layers)


def colour_scale(largest: int) -> list[list[Any]]:
    """Build Plotly's colour scale: one flat step for each rank from 0 to ``largest``. The page sets rank 0's colour.

    Example:
        >>> colour_scale(1)
        [[0.0, '#808080'], [0.5, '#808080'], [0.5, 'rgb(33,145,140)'], [1.0, 'rgb(33,145,140)']]
    """
    colours = ["#808080"]
    for rank in range(1, largest + 1):
        colours.append("rgb({},{},{})".format(*rank_colour(rank, largest)))
    count = len(colours)
    edges = ((at / count, colour) for number, colour in enumerate(colours) for at, colour in
             ((number, colour), (number + 1, colour)))  # fmt: skip
    return [[round(at, 6), colour] for at, colour in edges]


def budget(runs: Sequence[Run]) -> Figure | None:
    """Draw the budget and the ranks that are left, over the steps; None if no run has a history."""
    data = []
    for number, run in enumerate(runs):
        if len(run.records) < 2:
            continue
        steps = [record.step for record in run.records]
        budgets = [record.budget for record in run.records]
        line = {"shape": "hv", "color": _colour(number), "width": 2.5}
        data.append(_line(_of(run, "budget", runs), steps, budgets, line))
        ranks = [sum(record.ranks) for record in run.records]
        if ranks != budgets:
            line = {"shape": "hv", "color": _colour(number), "width": 1.5, "dash": "dot"}
            data.append(_line(_of(run, "ranks left", runs), steps, ranks, line))
    return _chart(data, "optimizer step", "ranks", yaxis={"rangemode": "tozero"})


def loss(runs: Sequence[Run]) -> Figure | None:
    """Draw the training loss and the held-out loss over the steps; None if no loss was logged."""
    data = []
    for number, run in enumerate(runs):
        for key, said, style in (
            ("loss", "training", {"width": 1.5}),
            ("eval_loss", "held out", {"width": 2.5, "dash": "dash"}),
        ):
            steps, values = series(run, key)
            if steps:
                trace = _line(_of(run, said, runs), steps, values, {"color": _colour(number), **style})
                trace["mode"] = "lines+markers" if key == "eval_loss" or len(steps) < 3 else "lines"
                data.append(trace)
    return _chart(data, "optimizer step", "loss")


def details(run: Run) -> Figure | None:
    """Draw the confusion matrix, or true against predicted numbers; None if the run has neither."""
    found = run.details
    if found.get("kind") == "confusion":
        labels, matrix = [_plain(str(label)) for label in found["labels"]], found["matrix"]
        count = len(labels)
        shares = [[value / max(1, sum(row)) for value in row] for row in matrix]
        trace = {
            "type": "heatmap", "x": labels, "y": labels, "z": shares, "zmin": 0, "zmax": 1,
            "customdata": matrix, "colorscale": "Blues", "reversescale": True, "showscale": False, "xgap": 1, "ygap": 1,
            "text": matrix if count <= 20 else [], "texttemplate": "%{text}" if count <= 20 else "",
            "hovertemplate": "%{y} taken for %{x}: %{customdata}<extra></extra>",
        }  # fmt: skip
        figure = (
            _chart([trace], "predicted", "true label", yaxis={"autorange": "reversed", "type": "category"})
            or {}
        )
        figure["layout"]["height"] = 160 + 24 * max(4, min(count, 40))
        figure["layout"]["xaxis"] |= {"type": "category"}
        return figure
    if found.get("kind") == "scatter":
        truth, guess = found["truth"], found["predicted"]
        ends = [min([*truth, *guess], default=0), max([*truth, *guess], default=1)]
        points = {"type": "scatter", "mode": "markers", "x": truth, "y": guess, "name": "held-out examples",
                  "marker": {"color": _colour(0), "size": 6, "opacity": 0.6}}  # fmt: skip
        line = _line("right", ends, ends, {"color": "#8a8f95", "width": 1.5, "dash": "dot"})
        return _chart([points, line], "true", "predicted")
    return None


def sweep(sweep: Sweep) -> Figure | None:
    """Draw every trial's metric against its adapter's parameters, and the frontier; None if no trial is complete."""
    data: list[dict[str, Any]] = []
    done = [trial for trial in sweep.trials if trial["state"] == "complete" and trial["value"] is not None]
    by_name = {trial["name"]: trial for trial in done}
    for number, method in enumerate(dict.fromkeys(trial["method"] for trial in done)):
        own = [trial for trial in done if trial["method"] == method]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": {"adalora": "AdaLoRA", "lora": "LoRA"}.get(method, _plain(method)),
                "x": [trial["parameters"] for trial in own],
                "y": [trial["value"] for trial in own],
                "text": [_plain(_settings(trial)) for trial in own],
                "hovertemplate": "%{text}<br>%{x:,} parameters: %{y:.4g}<extra></extra>",
                "marker": {"color": _colour(number), "symbol": ("circle", "diamond")[number % 2], "size": 9},
            }
        )
    frontier = [by_name[name] for name in sweep.frontier if name in by_name]
    x, y = [trial["parameters"] for trial in frontier], [trial["value"] for trial in frontier]
    data.insert(0, _line("frontier", x, y, {"shape": "hv", "color": "#8a8f95", "width": 1.5, "dash": "dot"}))
    figure = _chart(data if done else [], "parameters of the adapter", sweep.title)
    if figure is not None:
        figure["layout"]["xaxis"] |= _log_axis([trial["parameters"] for trial in done], "~s")
    return figure


def _settings(trial: dict[str, Any]) -> str:
    values = (
        f"{key.rpartition('.')[2]} {value:.3g}"
        if isinstance(value, float)
        else f"{key.rpartition('.')[2]} {value}"
        for key, value in trial["values"].items()
    )
    return f"{trial['name']}: {', '.join(values)}"


def series(run: Run, key: str) -> tuple[list[int], list[float]]:
    """The steps and values that a run logged under a name. If a step was logged twice, the last value counts."""
    logged = {entry["step"]: entry[key] for entry in run.log if key in entry}
    return list(logged), list(logged.values())


def spectra(run: Run) -> Figure | None:
    """Draw one line of singular values per layer, coloured by kind of module; None if no spectra are known."""
    paths = [layer.path for layer in run.adapter.layers if run.spectra.get(layer.path)]
    step = -(-len(paths) // _MOST_LINES) or 1
    kinds = list(dict.fromkeys(_kind(path) for path in paths))
    names, seen = _short_names(kinds), set[str]()
    data: list[dict[str, Any]] = []
    for path in paths[::step]:
        kind = _kind(path)
        number = kinds.index(kind)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": names[kind],
                "legendgroup": names[kind],
                "showlegend": kind not in seen,
                "x0": 1,
                "y": [float(f"{value:.4g}") if value > 0 else None for value in run.spectra[path]],
                "line": {"color": _colour(number), "width": 1, "dash": _dash(number)},
                "marker": {"size": 4},
                "opacity": 0.75,
                "text": _plain(path),
                "hovertemplate": "%{text}<br>singular value %{x}: %{y}<extra></extra>",
            }
        )
        seen.add(kind)
    drawn = [value for line in data for value in line["y"] if value]
    figure = _chart(data, "singular value", "size", yaxis=_log_axis(drawn, "~g"))
    if figure is not None:
        figure["layout"]["xaxis"] |= {"tickformat": "d", "rangemode": "tozero", "tick0": 1}
        longest = max(len(values) for values in run.spectra.values())
        figure["layout"]["xaxis"]["dtick"] = -(-longest // 12)
    return figure


def parameters(runs: Sequence[Run]) -> Figure:
    """Draw the number of adapter parameters in each kind of module, with one bar per run."""
    counts = [kind_parameters(run) for run in runs]
    names = _short_names(dict.fromkeys(kind for each in counts for kind in each))
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _plain(run.name),
            "y": [shorten(names[kind], 28) for kind in names],
            "x": [each.get(kind, 0) for kind in names],
            "marker": {"color": _colour(number)},
            "hovertemplate": "%{y}: %{x:,} parameters<extra>" + _plain(run.name) + "</extra>",
        }
        for number, (run, each) in enumerate(zip(runs, counts, strict=True))
    ]
    figure = _chart(data, "parameters", "", yaxis={"autorange": "reversed"}) or {}
    figure["layout"]["height"] = 110 + len(names) * (14 + 16 * len(runs))
    return figure


def kind_parameters(run: Run) -> dict[str, int]:
    """Count the adapter's parameters by kind of module, in the order of data flow, then by module saved in full."""
    counts: Counter[str] = Counter()
    for layer in run.adapter.layers:
        counts[_kind(layer.path)] += layer.parameters
    ordered = {kind: counts[kind] for kind in sorted(counts, key=kind_order)}
    return ordered | {f"{module.path} (whole)": module.parameters for module in run.adapter.saved_modules}


def _of(run: Run, what: str, runs: Sequence[Run]) -> str:
    return what if len(runs) == 1 else f"{run.name}: {what}"


def _kind(path: str) -> str:
    """The kind of module without numbers, so that all experts of a block count as one kind.

    Example:
        >>> _kind("model.layers.0.mlp.experts.7.w1"), _kind("model.layers.0.mlp.experts.down_proj.7")
        ('mlp.experts.w1', 'mlp.experts.down_proj')
    """
    kind = grid_position(path).kind
    return ".".join(part for part in kind.split(".") if not part.isdecimal()) or kind


def _short_names(kinds: Iterable[str]) -> dict[str, str]:
    given = list(kinds)
    short = [_plain(shorten(name, 2 * _LONGEST_LABEL)) for name in short_kinds(given)]
    return dict(zip(given, short, strict=True))


def _line(name: str, x: Sequence[Any], y: Sequence[Any], line: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": _plain(name),
        "x": list(x),
        "y": list(y),
        "line": line,
    }


def _chart(data: list[dict[str, Any]], x: str, y: str, yaxis: dict[str, Any] | None = None) -> Figure | None:
    if not data:
        return None
    layout = {
        "height": 340,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "xaxis": {"title": {"text": x}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": y}, "automargin": True, "zeroline": False, **(yaxis or {})},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "showlegend": len(data) > 1,
    }
    return {"data": data, "layout": layout}


def _ticks(names: Sequence[str], **more: Any) -> dict[str, Any]:
    """An axis with a name at each cell, or at every second, third, ... cell if there are many."""
    every = -(-len(names) // 64)
    shown = range(0, len(names), every)
    axis = {"tickvals": list(shown), "ticktext": [names[at] for at in shown], "automargin": True}
    return {**axis, "fixedrange": True, "showgrid": False, "zeroline": False, **more}


def _log_axis(values: Sequence[float], tickformat: str) -> dict[str, Any]:
    """A logarithmic axis with ticks at 1, 2 and 5. A narrow range may hold none of them, so its axis is linear."""
    narrow = len(values) > 0 and max(values) < 5 * min(values)
    return {"tickformat": tickformat} if narrow else {"type": "log", "dtick": "D2", "tickformat": tickformat}


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _dash(number: int) -> str:
    return _DASHES[number % len(_DASHES)]


def _plain(text: str) -> str:
    """Escape text so that Plotly shows it unchanged: it would read tags as markup."""
    return html.escape(text, quote=False)
