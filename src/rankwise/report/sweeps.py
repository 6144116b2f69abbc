"""A sweep's folder, as ``rankwise sweep`` writes it, for a page: its trials, and the runs that it kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.report.runs import json_object

SWEEP = "sweep.json"
_MOST_RUNS = 4  # of a sweep whose ranks are shown side by side


@dataclass(frozen=True)
class Sweep:
    """The trials of a sweep.

    Args:
        name: of its folder.
        title: of the metric, for people.
        style: how to format it.
        trials: each with ``name``, ``method``, ``values``, ``state``, ``value``, ``parameters`` and ``seconds``.
        frontier: the names of those that no other one beats with as few parameters, the smallest first.
        best: the name of the best; None if none was trained to its end.
        smallest: the name of the smallest within the tolerance.
        within: the tolerance, a share of the best value.
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
        """What was varied."""
        return list(dict.fromkeys(key for trial in self.trials for key in trial["values"]))

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """The trials: those trained to their end first, the best of all at the top, the smaller before the larger."""
        places = {name: at for at, name in enumerate(reversed(self.frontier))}
        return sorted(
            self.trials,
            key=lambda trial: (trial["state"] != "complete", places.get(trial["name"], len(places))),
        )

    def shown(self, value: float | None) -> str:
        """A value of the metric, as its task formats it."""
        return "–" if value is None else format(value, self.style)

    def remark(self, trial: dict[str, Any]) -> str:
        """What there is to say of a trial."""
        said = [] if trial["state"] == "complete" else [trial["state"]]
        said += ["best"] * (trial["name"] == self.best) + ["frontier"] * (trial["name"] in self.frontier)
        said += [f"smallest within {100 * self.within:g} %"] * (trial["name"] == self.smallest)
        return ", ".join([*said, *([trial["reason"]] if trial.get("reason") else [])])


def split_sweeps(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[Sweep], list[Path]]:
    """Tell sweeps from adapters.

    Returns:
        The sweeps, and the folders of adapters: those that were given, and of each sweep some that it kept, with its
        best and its smallest among them.

    Raises:
        ValueError: a sweep has no trial yet that was trained to its end.
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
            raise ValueError(f"{folder} holds a sweep of which no trial is done here yet.")
        sweeps.append(sweep)
        adapters += kept[:_MOST_RUNS]
    return sweeps, adapters
