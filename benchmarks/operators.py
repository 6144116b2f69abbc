"""The operators in which a training step spends processor time, by PyTorch's profiler."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

from torch.profiler import ProfilerActivity, profile
from trainings import MAIN, MODELS, Setting, Training, training_of

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::baddbmm_")
_COPIES = ("aten::copy_", "aten::clone", "aten::cat")
_STEPS = 10


def operators(asked: argparse.Namespace, setting: Setting) -> None:
    """Print the milliseconds of a step in matrix products, in copies and casts, and in everything else."""
    for name in asked.models:
        model = MODELS[name]
        for precision in asked.precisions:
            print(f"\n### Operators, processor time: {model.title}: {precision}\n")
            print(
                "| | matrix products, ms | copies and casts, ms | all else, ms |\n| --- | --- | --- | --- |"
            )
            for adapter, attach in MAIN.items():
                times = _spent(training_of(attach, model, replace(setting, precision=precision)))
                row = " | ".join(f"{times[kind]:.1f}" for kind in ("products", "copies", "else"))
                print(f"| {adapter} | {row} |", flush=True)


def _spent(training: Training) -> Counter[str]:
    for _ in range(3):
        training.step()
    spent: Counter[str] = Counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(_STEPS):
            training.step()
    for event in profiler.key_averages():
        kind = "products" if event.key in _PRODUCTS else "copies" if event.key in _COPIES else "else"
        spent[kind] += event.self_cpu_time_total / 1000 / _STEPS
    return spent
