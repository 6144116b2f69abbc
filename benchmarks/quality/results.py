"""The results of the comparison: one line of JSON for every finished run, and tables of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

START = (2e-3, 4e-3)  # the rates that are tried first; the next ones are twice and half of these
LORA, OURS = "PEFT LoRA", "rankwise"
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


def tables(results: Results, seed: int) -> str:
    """Markdown: for each task and rank, every method at its best rate, and how much worse it is at half and double."""
    lines: list[str] = []
    for task, rank, mine in _cells(results):
        lines += [
            "", f"### {task}, average rank {rank:g}", "",
            "| method | parameters | best rate | loss | at half of it | at double | single runs |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for method in _methods(mine):
            losses = curve(results, task, method, rank, seed)
            if not losses:
                continue
            best = min(losses, key=losses.__getitem__)
            inside = next_rate(losses) is None
            rows = [row for run, row in mine.items() if run.method == method and run.rate == best]
            found = [row["loss"] for row in rows]
            cells = [
                method,
                f"{round(statistics.mean(row['parameters'] for row in rows)):,}",
                f"{best:g}" if inside else f"{best:g} (the last one tried)",
                with_error(found),
                *(_at(losses, rate) for rate in (best / 2, 2 * best)),
                ", ".join(f"{loss:.4f}" for loss in found),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _at(losses: dict[float, float], rate: float) -> str:
    near = [loss for other, loss in losses.items() if math.isclose(rate, other, rel_tol=1e-6)]
    return f"{near[0]:.4f}" if near else "-"


def at_best(results: Results, task: str, method: str, rank: float, seed: int) -> list[float]:
    """The held-out losses of all seeds at the best rate; none where that is at the edge of what was tried."""
    best = best_rate(results, task, method, rank, seed)
    key = (task, method, rank, best)
    return [row["loss"] for run, row in results.items() if (run.task, run.method, run.rank, run.rate) == key]


def summary(results: Results, seed: int) -> str:
    """Markdown: LoRA, the best of the other methods, rankwise and LoRA of four times the rank, in each tuned cell.

    "Of the way" is how much of what four times the rank would give comes at the smaller budget. It is given where rank
    is scarce: where that is at least 5 % of LoRA's loss.
    """
    lines = [
        "| task | average rank | LoRA | best of the others | rankwise | LoRA, 4 times the rank | of the way |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, rank, mine in _cells(results):
        found = {method: at_best(results, task, method, rank, seed) for method in _methods(mine)}
        tuned = {method: losses for method, losses in found.items() if losses}
        if not {LORA, OURS} <= set(tuned):
            continue
        lora, ours = (statistics.mean(tuned[method]) for method in (LORA, OURS))
        others = {
            method: losses for method, losses in tuned.items() if method.startswith("PEFT") and method != LORA
        }
        best = min(others, key=lambda method: statistics.mean(others[method]), default=None)
        more = at_best(results, task, LORA, 4 * rank, seed)
        scarce = more and statistics.mean(more) <= 0.95 * lora
        way = f"{(lora - ours) / (lora - statistics.mean(more)):.0%}" if scarce else "-"
        cells = [
            task, f"{rank:g}", with_error(tuned[LORA]),
            f"{with_error(others[best])}, {best.removeprefix('PEFT ')}" if best else "-",
            with_error(tuned[OURS]), with_error(more) if more else "-", way,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against(results: Results, ours: str, theirs: str, seed: int) -> tuple[list[float], str]:
    """The differences of the held-out loss, theirs minus ours, of all pairs of runs, each method at its best rate.

    A pair has the same task, rank, seed, and so the same data in the same order. Each is divided by their loss. Cells
    in which a method's best rate is the last one tried take no part: it is not tuned there.

    Args:
        results: all runs.
        ours: a method.
        theirs: another.
        seed: the one that rates were chosen on.
    """
    found = []
    for run in results:
        if run.method != ours or run.rate != best_rate(results, run.task, ours, run.rank, seed):
            continue
        rate = best_rate(results, run.task, theirs, run.rank, seed)
        other = results.get(Run(run.task, theirs, run.rank, math.nan if rate is None else rate, run.seed))
        if other is not None:
            found.append((other["loss"] - results[run]["loss"]) / other["loss"])
    who = f"**{ours}** against **{theirs}**, each at its best rate"
    if not found:
        return [], f"{who}: no pairs yet"
    better = sum(difference > 0 for difference in found)
    mean = statistics.mean(found)
    return found, (
        f"{who}: held-out loss {'lower' if mean > 0 else 'higher'} by {abs(mean):.1%} on average "
        f"(standard error {error(found):.1%}), and lower in {better} of {len(found)} pairs"
    )


def report(results: Results, seeds: Sequence[int]) -> str:
    """The tables, and below them the pairs, and what all runs took."""
    others = [method for method in _methods(results) if method != OURS]
    compared = [against(results, OURS, other, seeds[0]) for other in others]
    pairs = [f"- {said}" for differences, said in compared if differences]
    hours = sum(row["seconds"] for row in results.values()) / 3600
    return "\n".join([
        summary(results, seeds[0]), "", *pairs, "", tables(results, seeds[0]), "",
        f"{len(results)} runs trained for {hours:.1f} hours in all, each with one thread.",
    ])  # fmt: skip


def _cells(results: Results) -> Iterator[tuple[str, float, Results]]:
    """Every task and rank, with their results."""
    for task in dict.fromkeys(run.task for run in results):
        for rank in sorted({run.rank for run in results if run.task == task}):
            own = {run: row for run, row in results.items() if (run.task, run.rank) == (task, rank)}
            yield task, rank, own


def _methods(results: Results) -> list[str]:
    return sorted({run.method for run in results}, key=_place)


def _place(method: str) -> tuple[bool, str]:
    return "rankwise" in method, method


def error(values: Iterable[float]) -> float:
    """The standard error of the mean."""
    values = list(values)
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def with_error(values: Sequence[float]) -> str:
    """The mean, and its standard error where there are more than one."""
    if len(values) < 2:
        return f"{values[0]:.4f} (1 run)"
    return f"{statistics.mean(values):.4f} ± {error(values):.4f} ({len(values)} runs)"
