"""The results of the comparison: one line of JSON for every finished run, and the search for the best learning rate."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

START = (2e-3, 4e-3)  # the rates that are tried first; the next ones are twice and half of these
RESULTS = Path(__file__).with_name("results.jsonl")


@dataclass(frozen=True)
class Run:
    """One training run; also the key of its result."""

    task: str
    method: str
    rank: float
    rate: float
    seed: int


Results = dict[Run, dict[str, Any]]


def read(path: Path = RESULTS) -> Results:
    """The results so far; a line that was cut off by a kill is not one."""
    found: Results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[Run(**row["run"])] = row
    return found


def append(run: Run, measured: dict[str, Any], path: Path = RESULTS) -> None:
    """Add a result."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"run": asdict(run), **measured}) + "\n")


def curve(results: Results, task: str, method: str, rank: float, seed: int) -> dict[float, float]:
    """Learning rate -> held-out loss of one seed, by rising rates; infinite where a run diverged."""
    cell = {run.rate: row for run, row in results.items() if (run.task, run.method, run.rank) == (task, method, rank)
            and run.seed == seed}  # fmt: skip
    return {rate: _finite(cell[rate]["loss"]) for rate in sorted(cell)}


def next_rate(losses: dict[float, float]) -> float | None:
    """The rate to try next, from those tried; None once the best has a worse neighbour on each side.

    Example:
        >>> next_rate({1e-3: 0.5, 2e-3: 0.4, 4e-3: 0.3})
        0.008
        >>> next_rate({1e-3: 0.5, 2e-3: 0.4, 4e-3: 0.6}) is None
        True
    """
    if not losses:
        return START[0]
    best = min(losses, key=losses.__getitem__)
    return next((rate for rate in (2 * best, best / 2) if not _tried(losses, rate)), None)


def best_rate(results: Results, task: str, method: str, rank: float, seed: int) -> float | None:
    """The rate with the smallest held-out loss for one seed; None unless it lies inside of what was tried."""
    losses = curve(results, task, method, rank, seed)
    return min(losses, key=losses.__getitem__) if losses and next_rate(losses) is None else None


def _tried(losses: dict[float, float], rate: float) -> bool:
    return any(math.isclose(rate, other, rel_tol=1e-6) for other in losses)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def at_best(results: Results, task: str, method: str, rank: float, seed: int) -> list[float]:
    """The held-out losses of all seeds at the best rate; none where that is at the edge of what was tried."""
    best = best_rate(results, task, method, rank, seed)
    key = (task, method, rank, best)
    return [row["loss"] for run, row in results.items() if (run.task, run.method, run.rank, run.rate) == key]


def error(values: Iterable[float]) -> float:
    """The standard error of the mean."""
    values = list(values)
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
