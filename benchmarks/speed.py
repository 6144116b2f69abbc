"""The cost of a training step: PEFT's LoRA and AdaLoRA against rankwise's, on random models of real shapes.

    python benchmarks/speed.py                               # all tables
    python benchmarks/speed.py --fast                        # fewer models, sizes and rounds
    python benchmarks/speed.py --tables models --rounds 40 --device cuda

A step is forward, backward, the optimizer's step and everything that the method does in between. All adapters take
turns in one process, so that other work on the machine affects all of them. Every time is divided by that of the frozen
model in the same round (forward, and backward down to its embeddings). The tables show the medians over the rounds.

Operations (without views) and bytes saved for the backward pass (without parameters) are those of a forward and a
backward pass. They are the same on every machine. The peak is that of CUDA's allocator, minus the memory before the
step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from between_steps import bookkeeping, saving
from compiled import compiled
from costs import Operations, saved_for_backward
from launches import launches
from operators import operators
from trainings import ALL, FLOOR, MAIN, MODELS, PRECISIONS, Model, Setting, Training, small, training_of

# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """The cost of one adapter's steps."""

    seconds: list[float] = field(default_factory=list)
    operations: int | None = None
    saved: int | None = None
    peak: int | None = None


def measure(
    model: Model, setting: Setting, adapters: dict[str, Callable[..., Training]], rounds: int
) -> dict[str, Cost]:
    """Let all adapters step in turns. The first three rounds, which allocate memory, are left out."""
    trainings: dict[str, Training] = {}
    for name, attach in adapters.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainings[name] = training_of(attach, model, setting)
    costs = {name: Cost() for name in adapters}
    for number in range(rounds + 3):
        for name in _rotated(list(adapters), number):
            seconds = _timed(trainings[name])
            if number >= 3:
                costs[name].seconds.append(seconds)
    for name, training in trainings.items():
        _count(training, costs[name])
    return costs


def _rotated(names: list[str], by: int) -> Iterator[str]:
    """Begin each round with another name, so that no adapter always follows the same one."""
    yield from names[by % len(names) :]
    yield from names[: by % len(names)]


def _timed(training: Training) -> float:
    """The seconds of a step, by the device's own clock if it has one."""
    if training.setting.device != "cuda":
        started = time.perf_counter()
        training.step()
        return time.perf_counter() - started
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    training.step()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


def _count(training: Training, cost: Cost) -> None:
    if training.setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        training.step()
        cost.peak = torch.cuda.max_memory_allocated() - held
    if training.setting.compiled:  # the compiler makes one operation out of many
        return
    training.model.zero_grad()  # adding to an existing gradient would be one more operation
    with saved_for_backward(training.model) as saved:
        training.gradients()
    training.model.zero_grad()
    with Operations() as operations:
        training.gradients()
    cost.operations, cost.saved = operations.count, saved.bytes


# --- tables --------------------------------------------------------------------------------------------------------


def table(costs: dict[str, Cost], adapted: int) -> str:
    """A Markdown table with one row per adapter; ``adapted`` is the number of adapted layers."""
    floor = costs[FLOOR]
    lines = [
        "| | times the frozen model's step | middle half of the rounds | operations | a layer | saved, MB | peak, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, cost in costs.items():
        ratios = [mine / other for mine, other in zip(cost.seconds, floor.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        each = (
            "" if cost.operations is None or floor.operations is None else cost.operations - floor.operations
        )
        lines.append(
            f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {cost.operations or ''} | "
            f"{each and f'{each / adapted:.1f}'} | {_mega(cost.saved)} | {_mega(cost.peak)} |"
        )
    return "\n".join(lines)


def _mega(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}"


def show(title: str, model: Model, setting: Setting, adapters: dict[str, Any], rounds: int) -> None:
    """Measure, and print a table with a title."""
    costs = measure(model, setting, adapters, rounds)
    with torch.device("meta"):
        made, _ = model.make()
    adapted = sum(path.endswith(tuple(model.targets)) for path, _ in made.named_modules())
    seconds = statistics.median(costs[FLOOR].seconds)
    if not setting.processes or torch.distributed.get_rank() == 0:
        print(
            f"\n### {title}\n\nThe frozen model's step: {seconds:.3f} s.\n\n{table(costs, adapted)}",
            flush=True,
        )


def models(asked: argparse.Namespace, setting: Setting) -> None:
    """Measure the models of real shapes, in each precision."""
    for name in asked.models:
        for precision in asked.precisions:
            adapters = ALL if precision == "float32" else MAIN
            title = f"{MODELS[name].title}: {precision}"
            show(title, MODELS[name], replace(setting, precision=precision), adapters, asked.rounds)


def growth(asked: argparse.Namespace, setting: Setting) -> None:
    """Measure how costs grow with layers, width and ranks."""
    rounds = max(asked.rounds // 2, 2)
    for layers in (4, 16) if asked.fast else (4, 16, 64):
        show(f"{layers} layers", small(layers, 64), setting, MAIN, rounds)
    for width in (64, 256) if asked.fast else (64, 256, 1024):
        show(f"4 layers of width {width}", small(4, width), setting, MAIN, rounds)
    for rank in (4, 16) if asked.fast else (4, 16, 64):
        ranks = replace(setting, rank=rank, spare=rank * 3 // 2)
        show(f"4 layers of width 256, rank {rank} from {ranks.spare}", small(), ranks, MAIN, rounds)


def settings(asked: argparse.Namespace, setting: Setting) -> None:
    """Measure with both kinds of checkpointing, and in two processes."""
    bfloat16 = replace(setting, precision="bfloat16")
    for kind in ("re-entrant", "not re-entrant"):
        show(f"Checkpointing, {kind}", small(), replace(bfloat16, checkpointing=kind), MAIN, asked.rounds)
    if setting.device == "cpu" or torch.cuda.device_count() > 1:
        torch.multiprocessing.spawn(_process, (asked, setting), nprocs=2)


def _process(number: int, asked: argparse.Namespace, setting: Setting) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(asked.port)}
    cuda = setting.device == "cuda"
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(number)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", rank=number, world_size=2)
    show("Two processes", small(), replace(setting, processes=True), MAIN, asked.rounds)
    torch.distributed.destroy_process_group()


TABLES = {
    "models": models,
    "growth": growth,
    "settings": settings,
    "compiled": compiled,
    "operators": operators,
    "launches": launches,
    "bookkeeping": bookkeeping,
    "saving": saving,
}


def main() -> None:
    """Measure, and print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="of the first kind of tables")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, help="measured steps of each adapter, at least 2")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--port", type=int, default=29_511, help="by which two processes find each other")
    parser.add_argument("--fast", action="store_true", help="one model, fewer rounds and sizes")
    asked = parser.parse_args()
    large = ["llama-1b"] if asked.device == "cuda" else []
    asked.models = asked.models or (["minilm"] if asked.fast else ["minilm", "smollm2", *large])
    asked.rounds = asked.rounds or (4 if asked.fast else 8)
    if asked.rounds < 2:
        parser.error(f"--rounds must be at least 2, not {asked.rounds}")
    torch.set_num_threads(asked.threads)
    for name in asked.tables:
        TABLES[name](asked, Setting(device=asked.device))


if __name__ == "__main__":
    main()
