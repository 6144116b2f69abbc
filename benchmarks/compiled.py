"""What ``torch.compile`` makes of a training step: kernels that it launches, and time."""

from __future__ import annotations

import argparse
import re
import statistics
import time
from dataclasses import replace

import torch
from torch._inductor.utils import run_and_get_code
from trainings import FLOOR, MAIN, STEPS_TO_A_CUT, Setting, Training, small, training_of

_CALL = re.compile(
    r"^    +(?:extern_kernels\.\w+|cpp_fused\w*|triton_\w+\.run|aten\.\w+\.\w+)\(", re.MULTILINE
)
_PRODUCT = re.compile(r"extern_kernels\.")


def compiled(asked: argparse.Namespace, setting: Setting) -> None:
    """The frozen model and each adapter, all compiled, in two precisions: with CUDA graphs where there is a GPU."""
    model = small(2, 64) if asked.fast else small()
    for precision in asked.precisions:
        if precision == "4-bit":  # which the compiler does not see through
            continue
        chosen = replace(setting, precision=precision, compiled=True)
        print(f"\n### Compiled, {model.title}: {precision}\n")
        print(
            "| | times the frozen model's step | kernels | of them matrix products |\n| --- | --- | --- | --- |"
        )
        trainings, counts = {}, {}
        for name, attach in MAIN.items():
            torch._dynamo.reset()
            trainings[name] = training_of(attach, model, chosen)
            counts[name] = kernels(trainings[name])
        seconds = _seconds(trainings, asked.rounds)
        for name in MAIN:
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[FLOOR], strict=True))
            print(f"| {name} | {ratio:.3f} | {counts[name][0]} | {counts[name][1]} |", flush=True)


def kernels(training: Training) -> tuple[int, int]:
    """Compile a training, and count the kernels that a forward and backward pass calls, and the products in them.

    The first cut changes the scale, and the compiler starts again. The counts are those of the step after it.
    """

    def until_a_cut() -> None:
        for _ in range(STEPS_TO_A_CUT + 1):
            training.step()

    _, sources = run_and_get_code(until_a_cut)
    calls = [call for source in sources[-2:] for call in _CALL.findall(source)]
    return len(calls), sum(bool(_PRODUCT.search(call)) for call in calls)


def _seconds(trainings: dict[str, Training], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for number in range(rounds + 3):
        for name, training in trainings.items():
            started = time.perf_counter()
            training.step()
            if training.setting.device == "cuda":
                torch.cuda.synchronize()
            if number >= 3:
                seconds[name].append(time.perf_counter() - started)
    return seconds
