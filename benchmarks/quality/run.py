"""Is the model better for the same number of parameters? LoRA, rsLoRA, EVA and AdaLoRA against rankwise.

    python benchmarks/quality/run.py --reviews movie-reviews.csv             # all runs that are missing; then the table
    python benchmarks/quality/run.py --reviews movie-reviews.csv --minutes 30  # as many as fit into half an hour
    python benchmarks/quality/run.py --table                                 # the table of what has been run

Every finished run is a line in results.jsonl, so that the command can be stopped and given again. All methods get
the same data in the same order, batch, schedule (linear decay after a warm-up of 5 %), clipping (1.0), number of steps
and number of trained parameters in the end. Rates are one ordinary learning rate of LoRA, and a small grid around it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.jsonl")
ORDINARY = 5e-4
GRID = (2e-4, 5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class Run:
    """One training run; also the key of its result."""

    task: str
    method: str
    rank: int
    rate: float
    seed: int


def wanted(
    tasks: Sequence[str],
    methods: Sequence[str],
    ranks: Sequence[int],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> Iterator[Run]:
    """All runs, so ordered that every task and method has its first seed at the ordinary rate first."""
    ordered = sorted(rates, key=lambda rate: rate != ORDINARY)
    for rate, seed, rank, task, method in itertools.product(ordered, seeds, ranks, tasks, methods):
        yield Run(task, method, rank, rate, seed)


def finished(path: Path) -> dict[Run, dict[str, Any]]:
    """The results so far; a line that was cut off by a kill is not one."""
    found: dict[Run, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[Run(**row["run"])] = row
    return found


def train(run: Run, reviews: Path) -> dict[str, Any]:
    """Train, and measure before and after."""
    import torch
    from methods import METHODS, after_step, penalty, trained_parameters
    from tasks import evaluated, make_task

    task = make_task(run.task, reviews)
    model = task.load(run.seed)
    torch.manual_seed(run.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = METHODS[run.method](model, task, run.rank, task.batches(run.seed))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=0.0)
    warmup = max(1, task.steps // 20)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (task.steps - step) / (task.steps - warmup))
    )
    model.eval()  # no dropout: the models are small, and the runs short
    started = time.perf_counter()
    for step, batch in enumerate(task.batches(run.seed), 1):
        (task.loss(model, batch) + penalty(model)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()
        after_step(model, step)
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return {
        "run": asdict(run),
        "parameters": trained_parameters(model),
        "seconds": round(seconds, 1),
        **evaluated(task, model),
    }


def table(results: dict[Run, dict[str, Any]]) -> str:
    """Markdown: for each task and rank the mean held-out loss, its standard error and all runs."""
    lines = []
    for task, rank in sorted({(run.task, run.rank) for run in results}):
        mine = {run: row for run, row in results.items() if (run.task, run.rank) == (task, rank)}
        lines += [
            "", f"### {task}, average rank {rank}", "",
            f"| method | parameters | loss at {ORDINARY:g} | best of the grid | all runs at {ORDINARY:g} |",
            "| --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for method in dict.fromkeys(run.method for run in mine):
            rows = {run: row for run, row in mine.items() if run.method == method}
            ordinary = [row["loss"] for run, row in _by_seed(rows) if run.rate == ORDINARY]
            best = min(
                (_mean([row["loss"] for run, row in rows.items() if run.rate == rate]), rate)
                for rate in {run.rate for run in rows}
            )
            parameters = max(row["parameters"] for row in rows.values())
            lines.append(
                f"| {method} | {parameters:,} | {_with_error(ordinary)} | {best[0]:.4f} at {best[1]:g} | "
                f"{', '.join(f'{loss:.4f}' for loss in ordinary)} |"
            )
    return "\n".join(lines)


def _by_seed(rows: dict[Run, dict[str, Any]]) -> list[tuple[Run, dict[str, Any]]]:
    return sorted(rows.items(), key=lambda item: item[0].seed)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _with_error(values: Sequence[float]) -> str:
    mean = _mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return f"{mean:.4f} ± {math.sqrt(variance / len(values)):.4f}"


def main() -> None:
    """Run what is missing, then print the table."""
    from methods import METHODS
    from tasks import TASKS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reviews", type=Path, help="CSV file with the columns text and rating")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--rates", nargs="+", type=float, default=list(GRID))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if not asked.table and (asked.reviews is None or not asked.reviews.is_file()):
        parser.error("--reviews must name the CSV file with the movie reviews")
    started = time.monotonic()
    runs = (
        [] if asked.table else list(wanted(asked.tasks, asked.methods, asked.ranks, asked.rates, asked.seeds))
    )
    missing = [run for run in runs if run not in finished(RESULTS)]
    for number, run in enumerate(missing, 1):
        if time.monotonic() - started > 60 * asked.minutes:
            print(f"{len(missing) - number + 1} runs are left: give the command again.")
            break
        row = train(run, asked.reviews)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(missing)} {run}: loss {row['loss']:.4f}, {row['seconds']} s", flush=True)
    print(table(finished(RESULTS)))


if __name__ == "__main__":
    main()
