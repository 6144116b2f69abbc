"""Costs of a run in addition to its steps' arithmetic: keeping count of ranks, and saving an adapter."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from costs import Operations
from trainings import MODELS, Setting, Training, peft_lora_adapting, rankwise_adalora, small, training_of

RUN, CUTS = 1000, 20  # optimizer steps of a run, and the number of cuts in it by default
# target_r, and the init_r that it gives by default
SPARE = {"minilm": (2, 8), "smollm2": (8, 16), "llama-1b": (8, 16), "tiny": (2, 8)}


# --- keeping count of ranks -----------------------------------------------------------------------------------------


class Watched:
    """A training whose controller is timed: the work before and after each optimizer step."""

    def __init__(self, training: Training) -> None:
        self.training, self._spent = training, 0.0
        controller = self.controller = (training.ranks or training.model)._rankwise_controller
        for name in ("before_step", "after_step"):
            setattr(controller, name, self._timed(getattr(controller, name)))

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = self._now()
            result = work(*arguments)
            self._spent += self._now() - started
            return result

        return timed

    def _now(self) -> float:
        """The time now: processor time, which other work on the machine disturbs least; on a GPU, after waiting."""
        if self.training.setting.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def step(self) -> tuple[float, float]:
        """Take a step. Return the seconds of the whole step, and of the controller."""
        self._spent = 0.0
        started = self._now()
        self.training.step()
        return self._now() - started, self._spent

    def operations_of_a_cut(self) -> int:
        """Take two steps, one of them with a cut. Return the number of its tensor operations."""
        cut, counted = self.controller._cut, Operations()

        def count(ranks: int) -> None:
            with counted:
                cut(ranks)

        self.controller._cut = count
        self.training.step()
        self.training.step()
        self.controller._cut = cut
        return counted.count


# the default form on rankwise's layers and on PEFT's, and the paper's form
RUNS: dict[str, Callable[..., Training]] = {
    "rankwise": partial(rankwise_adalora, deltaT=2),
    "PEFT's layers": partial(peft_lora_adapting, deltaT=2),
    "the paper's form": partial(rankwise_adalora, deltaT=2, init_lora_weights=True),
}


def bookkeeping(asked: argparse.Namespace, setting: Setting) -> None:
    """Time the run's own work around steps with and without a cut, in the pruning phase."""
    print(
        f"\n### Bookkeeping\n\nA run is {RUN:,} steps with {CUTS} cuts.\n\n"
        "| | layers | a step, ms | books, ms | with a cut, ms | a cut, in steps | its operations "
        "| books of a run, share of its time |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for name in asked.models:
        for kind, attach in RUNS.items():
            print(_row(f"{MODELS[name].title}, {kind}", name, attach, setting, asked.rounds), flush=True)


def _row(title: str, name: str, attach: Callable[..., Training], setting: Setting, rounds: int) -> str:
    rank, spare = SPARE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watched = Watched(training_of(attach, MODELS[name], replace(setting, rank=rank, spare=spare)))
    layers = len(watched.controller.factors.pairs)
    measured = [watched.step() for _ in range(4 + 2 * rounds)][4:]  # the first steps allocate memory
    plain, cut = measured[0::2], measured[1::2]
    books, with_cut = (statistics.median(books for _, books in each) for each in (plain, cut))
    step = statistics.median(whole - books for whole, books in measured)
    share = ((RUN - CUTS) * books + CUTS * with_cut) / RUN
    cells = (
        f"{1000 * step:.0f}",
        f"{1000 * books:.2f}",
        f"{1000 * with_cut:.1f}",
        f"{(with_cut - books) / (step + books):.2f}",
        f"{watched.operations_of_a_cut():,}",
        f"{share / (step + share):.2%}",
    )
    return f"| {title}, rank {spare} at first | {layers} | {' | '.join(cells)} |"


# --- saving ---------------------------------------------------------------------------------------------------------


def saving(asked: argparse.Namespace, setting: Setting) -> None:
    """Time PEFT and rankwise in turns. Each saves an adapter of many small layers over its previous one."""
    import peft

    import rankwise

    deep = small(24 if asked.fast else 96, 64)
    pruned = {"init_r": 12, "target_r": 8, "tinit": 1, "tfinal": 1, "total_step": 10}
    kinds: dict[str, tuple[dict[str, Any], str]] = {
        "LoRA, r 8": ({"r": 8}, "LoraConfig"),
        "AdaLoRA, 12 to 8": (pruned, "AdaLoraConfig"),
    }
    print(
        "\n### Saving\n\n| | layers | PEFT, s | rankwise, s | rankwise / PEFT |\n| --- | --- | --- | --- | --- |"
    )
    for title, (fields, config) in kinds.items():
        models = []
        for library in (peft, rankwise):
            made, _ = deep.make()
            chosen = getattr(library, config)(**fields, target_modules=list(deep.targets))
            models.append(library.get_peft_model(setting.model(made, deep.targets), chosen))
        theirs, ours = _seconds_to_save(models, 3 * asked.rounds)
        layers = sum(hasattr(module, "lora_A") for module in models[1].modules())
        ratio = statistics.median(own / other for own, other in zip(ours, theirs, strict=True))
        seconds = [f"{statistics.median(each):.3f}" for each in (theirs, ours)]
        print(f"| {title} | {layers} | {' | '.join(seconds)} | {ratio:.2f} |", flush=True)


def _seconds_to_save(models: list[Any], rounds: int) -> list[list[float]]:
    """The seconds of each model. The order changes from round to round, and the first round is left out."""
    seconds: list[list[float]] = [[] for _ in models]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(rounds + 1):
            for place in range(len(models)) if number % 2 else reversed(range(len(models))):
                started = time.perf_counter()
                models[place].save_pretrained(Path(folder) / str(place))
                seconds[place].append(time.perf_counter() - started)
    return [each[1:] for each in seconds]
