"""Everything that a folder records of a run: adapter, ranks over the steps, spectra, recipe and metrics."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.report.inspect import AdapterReport, inspect_adapter
from rankwise.report.spectra import update_spectra
from rankwise.run.history import RankRecord

_MOST_MOMENTS = 200  # of a history; a page's slider has no room for more positions


@dataclass(frozen=True)
class Run:
    """A run as a report page shows it.

    Args:
        name: a short name that no other run on the page has.
        adapter: the contents of the adapter's folder.
        records: the ranks over the run, in the order of ``adapter.layers``; only the last ones if no history was saved.
        spectra: the singular values of the updates, by module path; empty if they can't be computed.
        log: the logged entries, each with its ``step``.
        before: the metrics before training, by name.
        after: the metrics after training, by name.
        titles: a title for people, by the metric's name.
        styles: a format specification, by the metric's name.
        details: what the run's task wrote in addition to its metrics, such as a confusion matrix.
        samples: texts that the model wrote.
        recipe: the text of the run's recipe; empty if there is none.
        notes: what is missing from the folder, and why.
    """

    name: str
    adapter: AdapterReport
    records: list[RankRecord]
    spectra: dict[str, list[float]] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    styles: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def confusions(self) -> list[dict[str, Any]]:
        """The most frequent confusions of two labels, at most 20, the most frequent first."""
        if self.details.get("kind") != "confusion":
            return []
        labels = self.details["labels"]
        found = [
            {"true label": labels[true], "predicted": labels[guess], "how often": count}
            for true, row in enumerate(self.details["matrix"])
            for guess, count in enumerate(row)
            if count and true != guess
        ]
        return sorted(found, key=lambda each: -each["how often"])[:20]


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read the folders of adapters or of trainers' checkpoints, one run each.

    Raises:
        ValueError: a folder holds no adapter, a broken one, or one without layers. The message gives the remedy.
    """
    paths = [Path(folder) for folder in folders]
    return [_read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def thinned(records: list[RankRecord], most: int) -> list[RankRecord]:
    """Take at most ``most`` of a history's records, evenly spaced, including the first and the last.

    Example:
        >>> [record.step for record in thinned([RankRecord(step, 0, []) for step in range(10)], 4)]
        [0, 3, 6, 9]
    """
    most = max(2, most)
    if len(records) <= most:
        return records
    return [records[round(each * (len(records) - 1) / (most - 1))] for each in range(most)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Name each folder by as few last parts of its path as distinguish it from the others.

    Example:
        >>> short_names([Path("runs/a/out"), Path("runs/b/out")])
        ['a/out', 'b/out']
        >>> short_names([Path("out"), Path("out")])
        ['out (1)', 'out (2)']
    """
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.absolute().name} ({number})" for number, path in enumerate(paths, 1)]


def _read_run(folder: Path, name: str) -> Run:
    adapter = inspect_adapter(folder)
    if not adapter.layers:
        raise ValueError(f"{folder} adapts no layers: there are no ranks to report.")
    notes = list(adapter.notes)
    try:
        spectra = update_spectra(folder)
    except (OSError, TypeError, ValueError) as error:
        spectra = {}
        notes.append(f"The spectra of the updates are left out: {error}")
    results = _results(folder)
    log = results.get("log") or json_object(folder / "trainer_state.json").get("log_history")
    shown = {key: each for key, each in (results.get("metrics") or {}).items() if isinstance(each, dict)}
    return Run(
        name,
        adapter,
        _records(adapter, _last_step(adapter, results)),
        spectra,
        read_log(log),
        _numbers(results.get("before")),
        _numbers(results.get("after")),
        {key: str(each["title"]) for key, each in shown.items() if "title" in each},
        {key: str(each["style"]) for key, each in shown.items() if "style" in each},
        _object(results.get("details")),
        [each for each in results.get("samples") or () if isinstance(each, dict)],
        _recipe(folder),
        notes,
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _last_step(adapter: AdapterReport, results: dict[str, Any]) -> int | None:
    """The last step of the run; None if the folder does not record it."""
    if adapter.checkpoint is not None:
        return adapter.checkpoint.step
    step = results.get("steps") or (adapter.schedule or {}).get("total_step")
    return step if isinstance(step, int) and not adapter.resumable else None


def _records(adapter: AdapterReport, last: int | None) -> list[RankRecord]:
    """The history, thinned to fit a page, up to the run's last step; or the current ranks if there is no history."""
    now = [layer.rank for layer in adapter.layers]
    history = adapter.history
    if history is None or not history.records:
        step = adapter.checkpoint.step if adapter.checkpoint is not None else None
        return [RankRecord(step or 0, sum(now), now)]
    places = {path: index for index, path in enumerate(history.layers)}
    order = [places[layer.path] for layer in adapter.layers]
    records = thinned(history.records, _MOST_MOMENTS)
    if last is not None and last > records[-1].step:  # the last allocation is long before the run's end
        records = [*records, replace(records[-1], step=last)]
    return [RankRecord(each.step, each.budget, [each.ranks[index] for index in order]) for each in records]


def read_log(entries: Any) -> list[dict[str, Any]]:
    """Take the entries of a trainer's log that have a step, with their finite numbers only.

    Example:
        >>> read_log([{"step": 10, "loss": 0.5, "note": "x"}, {"loss": 1.0}])
        [{'step': 10, 'loss': 0.5}]
    """
    found = (
        (_numbers(entry) for entry in entries if isinstance(entry, dict)) if isinstance(entries, list) else ()
    )
    return [entry for entry in found if "step" in entry]


def _numbers(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        return {}
    return {
        str(key): value
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _results(folder: Path) -> dict[str, Any]:
    """The results that ``rankwise train`` wrote; for a checkpoint, only the metrics before training."""
    own = json_object(folder / "results.json")
    if own or not (folder / "trainer_state.json").is_file():
        return own
    return {"before": json_object(folder.parent / "results.json").get("before")}


def _recipe(folder: Path) -> str:
    for path in (folder / "recipe.yaml", folder.absolute().parent / "recipe.yaml"):
        checkpoint = path.parent == folder or (folder / "trainer_state.json").is_file()
        try:
            if checkpoint and path.is_file():
                return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
    return ""


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file's object. If it can't be read, return an empty one: the adapter is complete without it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
