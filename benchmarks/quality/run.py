r"""Is the model better for the same number of parameters? LoRA, rsLoRA, EVA and AdaLoRA against rankwise.

    VOICES="en-us+whisper en-gb-scotland+croak en-us+f5 en-029+m7"
    python recipes/speech/make_data.py speech --clips 800 --voice $VOICES
    python benchmarks/quality/run.py --reviews movie-reviews.csv --snippets hutto_ICWSM_2014 \
        --speech speech/manifest.csv
    python benchmarks/quality/run.py --tables

The third command makes all runs that are missing, then prints the tables; every finished run is a line in
results.jsonl, so that it can be stopped and given again. All methods get the same data in the same order, batch,
schedule (linear decay after a warm-up of 5 %), clipping (1.0), number of steps, and number of trained parameters in
the end. Each method is tuned: on the first seed its learning rate goes up and down by factors of two until the best one
has a worse neighbour on each side; then come the other seeds at that rate, and at those that the first seed can't tell
from it (within a standard deviation of single runs); the one with the least mean counts.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import results as saved
from results import Results, Run
from tasks import Sources

from report import report

LEAST_RANKS = {
    "PEFT rsLoRA": 2,
    "PEFT DoRA": 1,
    "PEFT PiSSA": 1,
    "PEFT LoRA+": 1,
    "PEFT LoRA, the MLP only": 1,
    "PEFT LoRA, without query and key": 1,
    "PEFT AdaLoRA": 1,
    "rankwise, the paper's form": 1,
}  # up to 1, rsLoRA is LoRA


def train(run: Run, sources: Sources, device: str = "cpu") -> dict[str, Any]:
    """Make a run of the comparison."""
    from methods import METHODS
    from registry import make_task

    task = make_task(run.task, sources)
    measured = train_with(METHODS[run.method], task, run.rank, run.rate, run.seed, device)
    return measured if device == "cpu" else {**measured, "device": device}


def train_with(
    method: Any, task: Any, rank: float, rate: float, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """Train, and measure."""
    import torch
    from methods import cut, trained_parameters
    from tasks import evaluated

    model = task.load(seed).to(device)
    model.eval()  # no dropout: the models are small, and the runs short
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = method(model, task, rank, task.batches(seed))
    started = time.perf_counter()
    fit(model, task, rate, seed)
    cut(model)
    seconds = time.perf_counter() - started
    return {
        "parameters": trained_parameters(model),
        "seconds": round(seconds, 1),
        **{name: round(value, 6) for name, value in evaluated(task, model).items()},
    }


def fit(model: Any, task: Any, rate: float, seed: int) -> None:
    """Train an adapted model on a task's batches: the same batches, schedule and clipping for every method."""
    import torch
    from methods import after_step, optimizer_for, penalty

    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_for(model, rate)
    warmup = max(1, task.steps // 20)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (task.steps - step) / (task.steps - warmup))
    )
    for step, batch in enumerate(task.batches(seed), 1):
        (task.loss(model, batch) + penalty(model)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()
        after_step(model, step)
        optimizer.zero_grad()


def wanted(asked: argparse.Namespace, found: Results) -> Iterator[Run]:
    """All runs of a comparison that can be named yet."""
    for rank, task, method in itertools.product(asked.ranks, asked.tasks, asked.methods):
        if rank >= LEAST_RANKS.get(method, 0):
            yield from saved.wanted(found, task, method, rank, asked.seeds)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Options for what is not in the project or a package."""
    parser.add_argument("--reviews", type=Path, help="CSV file with the columns text and rating")
    parser.add_argument("--snippets", type=Path, help="folder with VADER's *_GroundTruth.txt")
    parser.add_argument("--speech", type=Path, help="table that recipes/speech/make_data.py wrote")
    parser.add_argument("--whisper", default=Sources.whisper, help="whisper-tiny.en: a name or a folder")


def sources_of(asked: argparse.Namespace) -> Sources:
    """What `add_sources` asked for."""
    return Sources(asked.reviews, asked.snippets, asked.speech, asked.whisper)


def rank_of(text: str) -> float:
    """A whole number as such, as PEFT wants it."""
    return int(text) if text.isdecimal() else float(text)


def _worker(job: tuple[Run, Sources, str, float]) -> tuple[Run, dict[str, Any] | None]:
    run, sources, device, deadline = job
    if time.time() > deadline:
        return run, None
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return run, train(run, sources, device)


def make(runs: Sequence[Run], sources: Sources, device: str, workers: int, deadline: float) -> int:
    """Make runs, a process for each core, and write each down when it ends. Gives how many were not begun."""
    left = 0
    jobs = [(run, sources, device, deadline) for run in runs]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for number, (run, measured) in enumerate(pool.imap_unordered(_worker, jobs), 1):
            if measured is None:
                left += 1
                continue
            saved.append(run, measured)
            print(f"{number}/{len(runs)} {run}: loss {measured['loss']}, {measured['seconds']} s", flush=True)
    return left


def main() -> None:
    """Make what is missing, then print the tables."""
    from methods import METHODS
    from packages import why_not
    from registry import NEEDS, TASKS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sources(parser)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ranks", nargs="+", type=rank_of, default=[0.25, 1, 2, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the models train")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    parser.add_argument("--plot", type=Path, help="image file for the loss against the parameters")
    asked = parser.parse_args()
    sources = sources_of(asked)
    left_out = {} if asked.tables else {task: why_not(task) for task in asked.tasks if why_not(task)}
    for task, why in left_out.items():
        print(f"The task {task} is left out: {why}")
    asked.tasks = [task for task in asked.tasks if task not in left_out]
    for name in () if asked.tables else dict.fromkeys(NEEDS[task] for task in asked.tasks if task in NEEDS):
        place, kind = getattr(asked, name), "folder" if name == "snippets" else "file"
        if place is None or not (place.is_dir() if kind == "folder" else place.is_file()):
            parser.error(f"--{name} must name a {kind} that exists, not {place}")
    deadline = time.time() + 60 * asked.minutes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    while not asked.tables:
        found = saved.read()
        missing = list(dict.fromkeys(run for run in wanted(asked, found) if run not in found))
        if not missing:
            break
        if left := make(missing, sources, asked.device, asked.workers, deadline):
            print(f"{left} runs are left: give the command again.")
            break
    print("\n\n".join(report(saved.read(), asked.seeds[0]).values()))
    if asked.plot:
        from plot import draw

        draw(saved.read(), asked.seeds[0], asked.plot)


if __name__ == "__main__":
    main()
