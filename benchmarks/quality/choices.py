"""The default with some of its settings changed: what its choice rests on.

    python benchmarks/quality/choices.py init_r=4 tinit=0.1 tfinal=0.3 --reviews movie-reviews.csv

Trains as run.py does, for every rate and seed, and prints the held-out losses, and below them the best mean.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from tasks import Sources

from report import with_error


def setting(text: str) -> tuple[str, int | float]:
    """``init_r=4``, a field of AdaLoraConfig."""
    name, _, value = text.partition("=")
    return name, int(value) if value.isdecimal() else float(value)


def main() -> None:
    """Train and print."""
    import torch
    from methods import by_rankwise
    from registry import make_task

    from run import rank_of, train_with

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", type=setting, help="fields of AdaLoraConfig, as init_r=4")
    parser.add_argument("--reviews", type=Path, help="CSV file with the columns text and rating")
    parser.add_argument("--task", default="pairs")
    parser.add_argument("--rank", type=rank_of, default=1)
    parser.add_argument("--rates", nargs="+", type=float, default=[8e-3, 1.6e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    task, fields = make_task(asked.task, Sources(asked.reviews)), dict(asked.settings)
    means = {}
    for rate in asked.rates:
        losses = [
            train_with(
                lambda model, task, rank, batches: by_rankwise(model, task, rank, **fields),
                task, asked.rank, rate, seed,
            )["loss"]
            for seed in asked.seeds
        ]  # fmt: skip
        print(f"{rate:g}: {', '.join(f'{loss:.4f}' for loss in losses)}", flush=True)
        means[rate] = losses
    best = min(means, key=lambda rate: statistics.mean(means[rate]))
    print(f"best at {best:g}: {with_error(means[best])}")


if __name__ == "__main__":
    main()
