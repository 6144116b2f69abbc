"""The default with some of its settings changed: what its choice rests on.

    python benchmarks/quality/choices.py init_r=4 tinit=0.1 tfinal=0.3 --reviews movie-reviews.csv

Trains as run.py does, for every rate and seed, and prints the held-out losses, and below them the best mean.
"""

from __future__ import annotations

import argparse
import statistics

from report import with_error


def setting(text: str) -> tuple[str, float | bool]:
    """``init_r=4`` or ``init_lora_weights=true``, a field of AdaLoraConfig."""
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if value.isdecimal() else float(value)


def main() -> None:
    """Train and print."""
    import torch
    from methods import by_rankwise
    from registry import make_task

    from run import add_sources, rank_of, sources_of, train_with

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", type=setting, help="fields of AdaLoraConfig, as init_r=4")
    add_sources(parser)
    parser.add_argument("--task", default="pairs")
    parser.add_argument("--rank", type=rank_of, default=1)
    parser.add_argument("--rates", nargs="+", type=float, default=[8e-3, 1.6e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    task, fields = make_task(asked.task, sources_of(asked)), dict(asked.settings)
    means = {}
    for rate in asked.rates:
        measured = [
            train_with(
                lambda model, task, rank, batches: by_rankwise(model, task, rank, **fields),
                task, asked.rank, rate, seed,
            )
            for seed in asked.seeds
        ]  # fmt: skip
        means[rate] = [each["loss"] for each in measured]
        parameters = statistics.mean(each["parameters"] for each in measured)
        print(
            f"{rate:g}: {', '.join(f'{loss:.4f}' for loss in means[rate])}; {parameters:,.0f} parameters",
            flush=True,
        )
    best = min(means, key=lambda rate: statistics.mean(means[rate]))
    print(f"best at {best:g}: {with_error(means[best])}")


if __name__ == "__main__":
    main()
