"""Do ranks that are planned before training agree with those that AdaLoRA ends with, and what are they worth?

    python benchmarks/quality/plans.py --reviews movie-reviews.csv

For each task and seed, `rankwise.probe` looks at eight batches and plans ranks for as many parameters as LoRA of the
rank has. Then four adapters of that size and of one scale train on the same batches: LoRA with one rank everywhere,
with the plan, and with the plan's ranks shuffled among layers of one shape; and AdaLoRA as rankwise has it. Prints the
rank correlation (Spearman) of the plan and AdaLoRA's last ranks over the layers, and the held-out losses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from registry import make_task
from tasks import Sources, Task, evaluated

from run import fit

BATCHES, SCALE = 8, 2.0
METHODS = ("AdaLoRA", "planned", "one rank", "shuffled")


def planned(task: Task, seed: int, rank: int) -> Any:
    """The plan of a model that has not trained yet."""
    import rankwise as rw

    config = rw.LoraConfig(target_modules=list(task.targets), modules_to_save=list(task.heads) or None)
    batches = list(itertools.islice(task.batches(seed), BATCHES))
    return rw.probe(task.load(seed).eval(), batches, config, loss=task.loss).plan(rank=rank)


def shuffled(plan: Any, shapes: dict[str, Any], seed: int) -> Any:
    """The plan with its ranks dealt out anew among layers of one shape, so that its size stays."""
    import dataclasses

    ranks = dict(plan.ranks)
    for shape in set(shapes.values()):
        paths = [path for path in ranks if shapes[path] == shape]
        dealt = random.Random(seed).sample([ranks[path] for path in paths], len(paths))
        ranks.update(zip(paths, dealt, strict=True))
    return dataclasses.replace(plan, ranks=ranks)


def adapters(task: Task, plan: Any, rank: int, seed: int) -> Iterator[tuple[str, Any]]:
    """The four configurations."""
    import rankwise as rw

    heads = {"modules_to_save": list(task.heads) or None}
    alpha = {"lora_alpha": SCALE * rank}
    shapes = {path: tuple(task.load(seed).get_submodule(path).weight.shape) for path in plan.ranks}
    yield (
        "AdaLoRA",
        rw.AdaLoraConfig(
            target_r=rank, total_step=task.steps, target_modules=list(task.targets), **alpha, **heads
        ),
    )
    yield "planned", plan.lora_config(r=rank, **alpha, **heads)
    yield "one rank", rw.LoraConfig(r=rank, target_modules=list(task.targets), **alpha, **heads)
    yield "shuffled", shuffled(plan, shapes, seed).lora_config(r=rank, **alpha, **heads)


def correlation(plan: Any, model: Any) -> float:
    """Spearman's, of the plan's ranks and the model's, over the layers."""
    from scipy.stats import spearmanr

    last = {layer.path: layer.rank for layer in model.rank_summary().layers}
    return float(spearmanr([plan.ranks[path] for path in last], list(last.values())).statistic)


def main() -> None:
    """Make the runs, a line of JSON for each."""
    import torch
    from transformers.utils import logging

    import rankwise as rw

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reviews", type=Path, help="CSV file with the columns text and rating")
    parser.add_argument("--tasks", nargs="+", default=["names", "pairs"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=8e-3, help="the learning rate of all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sources = Sources(asked.reviews)
    for name, rank, seed in itertools.product(asked.tasks, asked.ranks, asked.seeds):
        task = make_task(name, sources)
        plan = planned(task, seed, rank)
        for method, config in adapters(task, plan, rank, seed):
            if method not in asked.methods:
                continue
            model = task.load(seed)
            torch.manual_seed(seed)
            model = rw.get_peft_model(model, config)
            fit(model, task, asked.rate, seed)
            line = {"task": name, "rank": rank, "seed": seed, "method": method}
            line |= {key: round(value, 4) for key, value in evaluated(task, model).items()}
            line["parameters"] = model.rank_summary().parameters
            if method == "AdaLoRA":
                line["correlation"] = round(correlation(plan, model), 3)
                line["at rank 0"] = sum(not value for value in plan.ranks.values())
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
