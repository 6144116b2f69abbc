"""The results of the comparison: one line of JSON for every finished run, and the search for the best learning rate."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

START = (2e-3, 4e-3)  # the rates that are tried first; the next ones are twice and half of these
STARTS = {"full fine-tuning": (1e-4, 2e-4), "PEFT PiSSA": (1e-3, 2e-3)}  # of methods whose rates are others
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
    return {rate: finite(cell[rate]["loss"]) for rate in sorted(cell)}


def next_rate(losses: dict[float, float], best: float | None = None) -> float | None:
    """The rate to try next, from those tried; None once ``best`` has a neighbour on each side.

    Left out, ``best`` is the one with the least loss.

    Example:
        >>> next_rate({1e-3: 0.5, 2e-3: 0.4, 4e-3: 0.3})
        0.008
        >>> next_rate({1e-3: 0.5, 2e-3: 0.4, 4e-3: 0.6}) is None
        True
    """
    if not losses:
        return START[0]
    best = _least(losses) if best is None else best
    return next((rate for rate in (2 * best, best / 2) if not _tried(losses, rate)), None)


def good_rates(results: Results, task: str, method: str, rank: float, seed: int) -> list[float]:
    """Rates to train all seeds at: the best of the first one, and those that it can't tell from it.

    These are the ones within a standard deviation of single runs, once there are several at the best.
    """
    losses = curve(results, task, method, rank, seed)
    if not losses or next_rate(losses) is not None:
        return []
    best = _least(losses)
    there = [finite(loss) for loss in _seeds(results, task, method, rank, best).values()]
    spread = statistics.stdev(there) if len(there) > 1 and math.inf not in there else 0.0
    return [rate for rate, loss in losses.items() if rate == best or loss <= losses[best] + spread]


def best_rate(results: Results, task: str, method: str, rank: float, seed: int) -> float | None:
    """The rate with the least mean loss, of those with all seeds; None unless it lies inside of what was tried."""
    best = _best_by_all_seeds(results, task, method, rank, seed)
    inside = best is not None and next_rate(curve(results, task, method, rank, seed), best) is None
    return best if inside else None


def _best_by_all_seeds(results: Results, task: str, method: str, rank: float, seed: int) -> float | None:
    """As `best_rate`, wherever it lies."""
    found = {
        rate: _seeds(results, task, method, rank, rate)
        for rate in good_rates(results, task, method, rank, seed)
    }
    most = max(map(len, found.values()), default=0)
    means = {
        rate: statistics.mean(map(finite, own.values())) for rate, own in found.items() if len(own) == most
    }
    return _least(means) if means else None


def _rows(
    results: Results, task: str, method: str, rank: float, rate: float | None
) -> dict[int, dict[str, Any]]:
    """Seed -> what was measured."""
    key = (task, method, rank, rate)
    return {
        run.seed: row for run, row in results.items() if (run.task, run.method, run.rank, run.rate) == key
    }


def _seeds(results: Results, task: str, method: str, rank: float, rate: float | None) -> dict[int, float]:
    """Seed -> held-out loss."""
    return {seed: row["loss"] for seed, row in _rows(results, task, method, rank, rate).items()}


def _least(losses: dict[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def _tried(losses: dict[float, float], rate: float) -> bool:
    return any(math.isclose(rate, other, rel_tol=1e-6) for other in losses)


def finite(loss: float) -> float:
    """Infinite where it is NaN: that run diverged."""
    return loss if math.isfinite(loss) else math.inf


def at_best(results: Results, task: str, method: str, rank: float, seed: int) -> list[float]:
    """The held-out losses of all seeds at the best rate; none where that is at the edge of what was tried."""
    best = best_rate(results, task, method, rank, seed)
    return list(_seeds(results, task, method, rank, best).values())


def parameters_at_best(results: Results, task: str, method: str, rank: float, seed: int) -> float:
    """How many numbers train in the end, on average over all seeds at the best rate, which must be known."""
    rows = _rows(results, task, method, rank, best_rate(results, task, method, rank, seed))
    return statistics.mean(row["parameters"] for row in rows.values())


def wanted(results: Results, task: str, method: str, rank: float, seeds: Sequence[int]) -> Iterator[Run]:
    """Runs that are to be made by now, or were: rates on the first seed, then the other seeds where they are good."""
    first, *others = seeds
    losses = curve(results, task, method, rank, first)
    more = next_rate(losses)
    untried = [rate for rate in STARTS.get(method, START) if rate not in losses]
    for rate in untried or ([] if more is None else [more]):
        yield Run(task, method, rank, rate, first)
    for rate in good_rates(results, task, method, rank, first):
        for seed in others:
            yield Run(task, method, rank, rate, seed)
    # The best by all seeds may be another than that of the first one, and must lie inside, too.
    best = _best_by_all_seeds(results, task, method, rank, first)
    more = None if best is None else next_rate(losses, best)
    if more is not None:
        yield Run(task, method, rank, more, first)


def error(values: Iterable[float]) -> float:
    """The standard error of the mean."""
    values = list(values)
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
