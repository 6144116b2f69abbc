"""The results of the comparison: one line of JSON for every finished run, and tables of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ORDINARY = 5e-4  # an ordinary learning rate of LoRA
GRID = (5e-4, 1e-3, 2e-3)
RESULTS = Path(__file__).with_name("results.jsonl")


@dataclass(frozen=True)
class Run:
    """One training run; also the key of its result."""

    task: str
    method: str
    rank: int
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


def best_rate(results: Results, task: str, method: str, rank: int, seed: int) -> float | None:
    """The rate of the grid with the smallest held-out loss for one seed; None before all of them have run."""
    runs = [Run(task, method, rank, rate, seed) for rate in GRID]
    if any(run not in results for run in runs):
        return None
    return min(runs, key=lambda run: _finite(results[run]["loss"])).rate


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def tables(results: Results, seeds: Sequence[int]) -> str:
    """Markdown: for each task and rank the means with standard errors, and all single runs at the ordinary rate."""
    lines: list[str] = []
    measures = {"accuracy", "wer"}
    for task, rank, mine in _cells(results):
        second = next((name for name in measures if any(name in row for row in mine.values())), None)
        lines += [
            "", f"### {task}, average rank {rank}", "",
            f"| method | parameters | loss at {ORDINARY:g} |{f' {second} |' if second else ''} "
            f"single runs at {ORDINARY:g} | loss at the best rate of the grid |",
            "| --- | --- | --- | --- | --- |" + (" --- |" if second else ""),
        ]  # fmt: skip
        for method in _methods(mine):
            rows = {run: row for run, row in mine.items() if run.method == method}
            ordinary = [rows[run] for run in sorted(rows, key=_seed) if run.rate == ORDINARY]
            if not ordinary:
                continue
            losses = [row["loss"] for row in ordinary]
            best = best_rate(results, task, method, rank, seeds[0])
            at_best = [row["loss"] for run, row in rows.items() if run.rate == best]
            cells = [
                method,
                f"{round(statistics.mean(row['parameters'] for row in ordinary)):,}",
                with_error(losses),
                *([with_error([row[second] for row in ordinary])] if second else []),
                ", ".join(f"{loss:.4f}" for loss in losses),
                "" if best is None else f"{with_error(at_best)} at {best:g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against(
    results: Results, ours: str, theirs: str, rank: int | None = None, tuned_on: int | None = None
) -> tuple[list[float], str]:
    """The differences of the held-out loss, theirs minus ours, of all pairs of runs.

    A pair has the same task, rank, seed, and so the same data in the same order. Each is divided by their loss.

    Args:
        results: all runs.
        ours: a method.
        theirs: another.
        rank: only pairs of that rank.
        tuned_on: a seed; each method has the rate of the grid that was best for it there. Both have the ordinary rate
            if it is left out.
    """

    def run(task: str, method: str, rank: int, seed: int) -> Run:
        rate = ORDINARY if tuned_on is None else best_rate(results, task, method, rank, tuned_on)
        return Run(task, method, rank, math.nan if rate is None else rate, seed)

    mine = [each for each in results if each.method == ours and rank in (None, each.rank)]
    cells = dict.fromkeys((each.task, each.rank, each.seed) for each in mine)
    pairs = [(run(task, ours, r, seed), run(task, theirs, r, seed)) for task, r, seed in cells]
    found = [
        (results[their]["loss"] - results[our]["loss"]) / results[their]["loss"]
        for our, their in pairs
        if our in results and their in results
    ]
    who = f"**{ours}** against **{theirs}**"
    who += "" if rank is None else f" at average rank {rank}"
    who += "" if tuned_on is None else ", each at its best rate of the grid"
    if not found:
        return [], f"{who}: no pairs yet"
    better = sum(difference > 0 for difference in found)
    return found, (
        f"{who}: held-out loss lower by {statistics.mean(found):.1%} on average "
        f"(standard error {_error(found):.1%}), and lower in {better} of {len(found)} pairs"
    )


def grid(results: Results, seed: int) -> str:
    """Markdown: the held-out loss of one seed at every rate of the grid, where there are others than the ordinary."""
    lines = [
        f"| task, average rank, method | {' | '.join(f'{rate:g}' for rate in GRID)} |",
        "| --- |" + " --- |" * len(GRID),
    ]
    for task, rank, mine in _cells(results):
        for method in _methods(mine):
            rows = [mine.get(Run(task, method, rank, rate, seed)) for rate in GRID]
            if any(row is not None for row in rows[1:]):
                losses = ["" if row is None else f"{row['loss']:.4f}" for row in rows]
                lines.append(f"| {task}, {rank}, {method} | {' | '.join(losses)} |")
    return "\n".join(lines)


# Who is set against whom: the default against all, and like against like where only the scale differs.
PAIRS = (
    *(("rankwise", f"PEFT {name}") for name in ("LoRA", "rsLoRA", "EVA", "AdaLoRA")),
    ("rankwise, lora_alpha=32", "PEFT LoRA, lora_alpha=32"),
    ("rankwise, LoRA's lora_alpha", "PEFT LoRA"),
    ("rankwise, rsLoRA's scale", "PEFT rsLoRA"),
)


def report(results: Results, seeds: Sequence[int]) -> str:
    """The tables, and below them the pairs, the grid, and what all runs took."""
    compared = [against(results, *pair) for pair in PAIRS]
    compared += [against(results, "rankwise", "PEFT LoRA", rank) for rank in (2, 8)]
    compared += [against(results, *pair, tuned_on=seeds[0]) for pair in PAIRS]
    pairs = [f"- {said}" for differences, said in compared if differences]
    hours = sum(row["seconds"] for row in results.values()) / 3600
    return "\n".join([
        tables(results, seeds), "", *pairs, "", grid(results, seeds[0]), "",
        f"{len(results)} runs trained for {hours:.1f} hours in all, each with one thread.",
    ])  # fmt: skip


def _cells(results: Results) -> Iterator[tuple[str, int, Results]]:
    """Every task and rank, with their results."""
    for task in dict.fromkeys(run.task for run in results):
        for rank in sorted({run.rank for run in results if run.task == task}):
            yield (
                task,
                rank,
                {run: row for run, row in results.items() if (run.task, run.rank) == (task, rank)},
            )


def _methods(results: Results) -> list[str]:
    return sorted({run.method for run in results}, key=_place)


def _place(method: str) -> tuple[bool, str]:
    return "rankwise" in method, method


def _seed(run: Run) -> int:
    return run.seed


def _error(values: Iterable[float]) -> float:
    """The standard error of the mean."""
    values = list(values)
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def with_error(values: Sequence[float]) -> str:
    """The mean, and its standard error where there are more than one."""
    if len(values) < 2:
        return f"{values[0]:.4f} (1 run)"
    return f"{statistics.mean(values):.4f} ± {_error(values):.4f}"
