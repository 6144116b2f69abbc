"""The folder of a sweep, written by ``rankwise sweep``, for a report page: its trials and the runs that it kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.report.runs import json_object

SWEEP = "sweep.json"
_MOST_RUNS = 4  # runs of one sweep whose ranks are shown side by side


@dataclass(frozen=True)
class Sweep:
    """The trials of a sweep.

    Args:
        name: the folder's name.
        title: the metric's title, for people.
        style: the metric's format specification, such as ``".1%"``.
        trials: one entry per trial, with ``name``, ``method``, ``values``, ``state``, ``value``, ``parameters`` and
            ``seconds``.
        frontier: the names of the trials that no trial with as few parameters beats, the smallest first.
        best: the name of the best trial; None if none was trained to its end.
        smallest: the name of the smallest trial within the tolerance.
        within: the tolerance, as a share of the best value.
    """

    name: str
    title: str
    style: str
    trials: Sequence[dict[str, Any]]
    frontier: Sequence[str]
    best: str | None
    smallest: str | None
    within: float

    @property
    def keys(self) -> list[str]:
        """The settings that were varied."""
        return list(dict.fromkeys(key for trial in self.trials for key in trial["values"]))

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """All trials: complete ones first, then by the frontier from the best down to the smallest."""
        places = {name: at for at, name in enumerate(reversed(self.frontier))}
        return sorted(
            self.trials,
            key=lambda trial: (trial["state"] != "complete", places.get(trial["name"], len(places))),
        )

    def shown(self, value: float | None) -> str:
        """Format a value of the metric as its task does."""
        return "–" if value is None else format(value, self.style)

    def remark(self, trial: dict[str, Any]) -> str:
        """Describe a trial: its state if it is not complete, its distinctions, and the reason if it failed."""
        said = [] if trial["state"] == "complete" else [trial["state"]]
        said += ["best"] * (trial["name"] == self.best) + ["frontier"] * (trial["name"] in self.frontier)
        said += [f"smallest within {100 * self.within:g} %"] * (trial["name"] == self.smallest)
        return ", ".join([*said, *([trial["reason"]] if trial.get("reason") else [])])


def split_sweeps(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[Sweep], list[Path]]:
    """Separate the folders of sweeps from the folders of adapters.

    Returns:
        The sweeps, and the folders of adapters. The folders include some that each sweep kept, among them its best
        and its smallest.

    Raises:
        ValueError: a sweep's file is broken, or none of its trials has been trained to its end yet.
    """
    sweeps, adapters = [], []
    for folder in map(Path, folders):
        data = json_object(folder / SWEEP)
        if not data:
            adapters.append(folder)
            continue
        try:
            sweep = Sweep(
                folder.resolve().name, str(data["title"]), str(data["style"]), list(data["trials"]),
                list(data["frontier"]), data["best"], data["smallest"], float(data["within"]),
            )  # fmt: skip
            first = [sweep.best, sweep.smallest, *data["best_by_method"].values(), *data["frontier"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / SWEEP} is broken ({error!r}). Run `rankwise sweep` again."
            ) from error
        names = [name for name in dict.fromkeys(first) if name]
        kept = [path for name in names if (path := folder / "trials" / name).is_dir()]
        if not kept:
            raise ValueError(f"{folder} holds a sweep without any finished trial here.")
        sweeps.append(sweep)
        adapters += kept[:_MOST_RUNS]
    return sweeps, adapters
