"""A report as one HTML page that needs no network: it contains Plotly's library, the data and the style.

The library and the data are compressed, and a script in the page unpacks them. The tables are plain HTML, so they show
without JavaScript too.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from rankwise.files.atomic import write_file
from rankwise.method.spectrum import effective_rank
from rankwise.report import figures
from rankwise.report.grid import RankGrid, largest_rank, short_kinds
from rankwise.report.runs import Run, read_runs, thinned
from rankwise.report.sweeps import Sweep, split_sweeps
from rankwise.run.history import RankRecord

_MOST_BYTES = 2_000_000
_MOST_ROWS = 2000  # over all tables of layers
_MOST_CELLS = 20_000  # over all tables of ranks
_MOST_VALUES = 16  # singular values per layer in a table
_MOST_ENTRIES = 40  # rows of a table that shows a log or a history


def write_report(
    folders: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a page about one or more adapters: ranks over the steps, budget, loss, spectra, parameters, recipes.

    Args:
        folders: folders of adapters, of trainers' checkpoints (by rankwise or PEFT) or of sweeps.
        path: the file to write. It is written atomically.
        overwrite: whether to replace the file if it exists.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False, or ``path`` is a folder.
        ImportError: jinja2 is not installed.
        ValueError: no folder is given, or a folder holds no adapter, a broken one, or one without layers.

    Example:
        >>> import os, tempfile, torch, rankwise
        >>> config = rankwise.LoraConfig(r=2, target_modules=["0"])
        >>> model = rankwise.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/adapter")
        ...     write_report([f"{folder}/adapter"], f"{folder}/report.html")
        ...     sorted(os.listdir(folder))
        ['adapter', 'report.html']
    """
    path = Path(path)
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder. Give the name of a file, such as {path / 'report.html'}.")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists. To replace it, add --overwrite; to keep it, choose another name."
        )
    write_file(path, render_report(folders))


def render_report(folders: Sequence[str | os.PathLike[str]]) -> str:
    """Return the page that `write_report` writes.

    Args:
        folders: folders of adapters, of trainers' checkpoints or of sweeps.

    Returns:
        The page's HTML.

    Raises:
        ImportError: jinja2 is not installed.
        ValueError: no folder is given, or a folder holds no adapter, a broken one, or one without layers.

    Example:
        >>> import tempfile, torch, rankwise
        >>> config = rankwise.LoraConfig(r=2, target_modules=["0"])
        >>> model = rankwise.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     page = render_report([folder])
        >>> page.startswith("<!doctype html>")
        True
    """
    if not folders:
        raise ValueError("A report needs at least one adapter's folder.")
    try:
        import jinja2
    except ImportError as error:
        raise ImportError('Reports need jinja2: pip install "rankwise[report]"') from error
    sweeps, adapters = split_sweeps(folders)
    runs = read_runs(adapters)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["thousands"] = "{:,}".format
    environment.filters["short"] = "{:.4g}".format
    environment.filters["place"] = _place
    template = environment.get_template("report.html.jinja")
    while True:
        page = Page(runs, sweeps)
        text = template.render(page=page, runs=runs, asset=_asset, packed_asset=_packed_asset)
        moments = max(len(run.records) for run in runs)
        if len(text.encode()) < _MOST_BYTES or moments <= 2:
            return text
        runs = [replace(run, records=thinned(run.records, moments // 2)) for run in runs]


class Page:
    """The data that the page's template reads.

    Args:
        runs: the runs on the page.
        sweeps: the sweeps that some of the runs belong to.
    """

    def __init__(self, runs: Sequence[Run], sweeps: Sequence[Sweep] = ()) -> None:
        self.runs = runs
        self.sweeps = sweeps
        self._grids = {run.name: figures.grids_of(run) for run in runs}
        cells = sum(len(grid.rows) * len(grid.columns) for grids in self._grids.values() for grid in grids)
        self._shown = min(
            1.0, _MOST_CELLS / max(1, cells)
        )  # the share of rows that each table of ranks shows
        self.figures: dict[str, figures.Figure] = {}
        self.frames: list[dict[str, Any]] = []
        ever = max(max(record.ranks) for run in runs for record in run.records)
        self._largest = max(ever, *(largest_rank(run.adapter.summary().layers) for run in runs))
        for number, run in enumerate(runs):
            self._add_heatmaps(number, run)
        for number, sweep in enumerate(sweeps):
            self._add(f"sweep-{number}", figures.sweep(sweep))
        self._add("budget", figures.budget(runs))
        self._add("loss", figures.loss(runs))
        self._add("parameters", figures.parameters(runs))
        for number, run in enumerate(runs):
            self._add(f"spectra-{number}", figures.spectra(run))
            self._add(f"details-{number}", figures.details(run))

    def _add(self, name: str, figure: figures.Figure | None) -> None:
        if figure is not None:
            self.figures[name] = figure

    def _add_heatmaps(self, number: int, run: Run) -> None:
        grids = self.grids(run)
        cells = {}
        for place, grid in enumerate(grids):
            name = f"ranks-{number}-{place}"
            last = place == len(grids) - 1
            self.figures[name], cells[name] = figures.heatmap(run, grid, self._largest, last)
        self.frames.append(
            {
                "steps": [record.step for record in run.records],
                "budgets": [record.budget for record in run.records],
                "first": run.records[0].ranks,
                "changes": [
                    _changes(before.ranks, after.ranks)
                    for before, after in zip(run.records, run.records[1:], strict=False)
                ],
                "cells": cells,
            }
        )

    @property
    def data(self) -> str:
        """The figures and frames as compressed JSON."""
        return _packed(
            json.dumps(
                {"figures": self.figures, "frames": self.frames}, separators=(",", ":"), allow_nan=False
            )
        )

    @property
    def steps(self) -> list[int]:
        """The optimizer steps at which any run has a record; the page's slider stops at each."""
        return sorted({record.step for run in self.runs for record in run.records})

    def grids(self, run: Run) -> list[RankGrid]:
        """The grids of a run's layers."""
        return self._grids[run.name]

    def headings(self, grid: RankGrid) -> list[str]:
        """The column headings of a grid's table."""
        return short_kinds(grid.columns)

    def rows(self, grid: RankGrid) -> int:
        """The number of rows that a grid's table shows; a page with many cells shows only a part."""
        return max(1, int(len(grid.rows) * self._shown))

    def layers(self, run: Run) -> list[dict[str, Any]]:
        """One row per layer, up to a limit."""
        rows = []
        for layer in run.adapter.layers[: max(1, _MOST_ROWS // len(self.runs))]:
            values = run.spectra.get(layer.path)
            rows.append(
                {
                    "layer": layer,
                    "norm": math.hypot(*values) if values is not None else None,
                    "effective": effective_rank(values) if values is not None else None,
                    "singular": _listed(values or []),
                }
            )
        return rows

    def log(self, run: Run) -> tuple[list[str], list[dict[str, Any]]]:
        """The names and entries of the log (losses, held-out metrics, budget), thinned for a table."""
        names = dict.fromkeys(key for entry in run.log for key in entry)
        shown = [key for key in names if key in ("loss", "budget", "total_rank") or _is_metric(key)]
        entries = [entry for entry in run.log if any(key in entry for key in shown)]
        return shown, _thinned(entries)

    def moments(self, run: Run) -> list[RankRecord]:
        """The rank history, thinned for a table."""
        return _thinned(run.records)

    def metrics(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Each metric's title, and its values before and after training in each run, as text."""
        names = dict.fromkeys(key for run in self.runs for side in (run.before, run.after) for key in side)
        titles = {
            name: next((run.titles[name] for run in self.runs if name in run.titles), name) for name in names
        }
        return [
            (
                titles[name],
                [(_shown(run, name, run.before), _shown(run, name, run.after)) for run in self.runs],
            )
            for name in names
        ]

    def counts_parameters(self) -> bool:
        """Whether the budget counts parameters: some run then holds more ranks than its budget."""
        return any(sum(record.ranks) > record.budget for run in self.runs for record in run.records)

    def kinds(self) -> list[tuple[str, list[int | None]]]:
        """Each kind of module, and its number of parameters in each run."""
        counts = [figures.kind_parameters(run) for run in self.runs]
        names = dict.fromkeys(kind for each in counts for kind in each)
        return [(name, [each.get(name) for each in counts]) for name in names]


def _shown(run: Run, name: str, values: dict[str, float]) -> str:
    """Format a metric as the run's task does; with four digits if the folder is too old to record a format."""
    if name not in values:
        return "–"
    with contextlib.suppress(ValueError):
        return format(values[name], run.styles.get(name) or ".4g")
    return f"{values[name]:.4g}"


def _listed(values: list[float]) -> str:
    """List the first values, for a table.

    Example:
        >>> _listed([2.0, 0.12345])
        '2, 0.123'
    """
    more = ", …" if len(values) > _MOST_VALUES else ""
    return ", ".join(f"{value:.3g}" for value in values[:_MOST_VALUES]) + more


def _thinned(entries: list[Any]) -> list[Any]:
    every = -(-len(entries) // _MOST_ENTRIES) or 1
    return [entry for at, entry in enumerate(entries) if at % every == 0 or at == len(entries) - 1]


def _is_metric(key: str) -> bool:
    return key.startswith("eval_") and not key.endswith(("_runtime", "_per_second"))


def _place(name: str) -> str:
    """A model's name, or the last two parts of its path: readers of the page need not see the author's folders.

    Example:
        >>> _place("/home/me/models/bert"), _place("org/bert")
        ('models/bert', 'org/bert')
    """
    path = Path(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def _changes(before: list[int], after: list[int]) -> list[int]:
    """List the ranks that changed: each layer's index, followed by its new rank.

    Example:
        >>> _changes([4, 4, 4], [4, 2, 3])
        [1, 2, 2, 3]
    """
    return [
        number
        for layer, (old, new) in enumerate(zip(before, after, strict=True))
        if new != old
        for number in (layer, new)
    ]


def _packed(text: str) -> str:
    """Compress text with gzip and encode it in base64; the page's script unpacks it."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


@cache
def _packed_asset(name: str) -> str:
    return _packed(_asset(name))


def _asset(name: str) -> str:
    return (files("rankwise.report") / "page" / name).read_text(encoding="utf-8")
