"""What launching takes: a chain of linear layers so narrow that their arithmetic costs nothing, by processor time."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from trainings import FLOOR, MAIN, Model, Setting, Training, training_of

_LAYERS, _WIDTH, _TOKENS = 40, 64, (1, 4)


class _Chain(nn.Module):
    """Layers one after the other; its loss is the sum of what the last gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(_LAYERS))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return argparse.Namespace(loss=x.sum())

    def enable_input_require_grads(self) -> None:
        """As Transformers' models have it: here the input itself asks for a gradient."""


def _chain() -> tuple[nn.Module, dict[str, Tensor]]:
    return _Chain(), {"x": torch.randn(*_TOKENS, _WIDTH, requires_grad=True)}


def launches(asked: argparse.Namespace, setting: Setting) -> None:
    """Microseconds of one thread for a layer, forward and backward: a tenth of the rounds took less."""
    model = Model("A chain of linear layers", _chain, [f"layers.{number}" for number in range(_LAYERS)])
    rounds = max(10 * asked.rounds, 20)
    print("\n### Launches: microseconds a layer, by processor time\n")
    print("| | forward | backward | both | of PEFT LoRA's |\n| --- | --- | --- | --- | --- |")
    for precision in asked.precisions:
        chosen = replace(setting, precision=precision)
        spent = _spent(MAIN, model, chosen, rounds)
        theirs = sum(spent["PEFT LoRA"])
        for name, (forward, backward) in spent.items():
            both = forward + backward
            share = "" if name == FLOOR else f"{both / theirs:.2f}"
            print(
                f"| {precision}: {name} | {forward:.1f} | {backward:.1f} | {both:.1f} | {share} |", flush=True
            )


def _spent(
    adapters: dict[str, Callable[..., Training]], model: Model, setting: Setting, rounds: int
) -> dict[str, tuple[float, float]]:
    trainings = {name: training_of(attach, model, setting) for name, attach in adapters.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in adapters}
    was = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, training in trainings.items():
                training.model.zero_grad()
                times[name].append(_pass(training))
    finally:
        if was:
            gc.enable()
    return {name: (_low(forward for forward, _ in each), _low(backward for _, backward in each))
            for name, each in times.items()}  # fmt: skip


def _pass(training: Training) -> tuple[float, float]:
    half = training.setting.precision.endswith("autocast")
    x = training.batch["x"].detach()
    x = x.to(torch.bfloat16) if training.setting.precision in ("bfloat16", "4-bit") else x
    begun = time.process_time()
    with torch.autocast(training.setting.device, dtype=torch.bfloat16, enabled=half):
        loss = training.forward(x.requires_grad_()).loss
    between = time.process_time()
    loss.backward()
    return between - begun, time.process_time() - between


def _low(seconds: Any) -> float:
    """What a tenth of the passes stayed below, for a layer, in microseconds."""
    ordered = sorted(seconds)
    return 1e6 * float(ordered[len(ordered) // 10]) / _LAYERS
