"""A recipe that several processes train gives the same run as one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file

from language_world import questions, save_language_model, write_language_recipe, write_lines
from rankwise.recipes import load_recipe, train


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = save_language_model(tmp_path / "model")
    write_lines(tmp_path / "questions.jsonl", questions())
    data = {
        "train": str(tmp_path / "questions.jsonl"),
        "prompt": "question",
        "completion": "answer",
        "train_size": 48,
    }
    return write_language_recipe(
        tmp_path, model, data, training__logging_steps=1, training__per_device_train_batch_size=8
    )


def test_a_model_that_was_evaluated_before_is_connected_for_training(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate connects a model to other processes only if it does not consider it prepared already."""
    calls: list[tuple[bool, bool]] = []
    prepare = Accelerator.prepare_model

    def spy(self: Accelerator, model: Any, *args: Any, **options: Any) -> Any:
        calls.append((bool(options.get("evaluation_mode")), hasattr(model, "_is_accelerate_prepared")))
        return prepare(self, model, *args, **options)

    monkeypatch.setattr(Accelerator, "prepare_model", spy)
    train(load_recipe(recipe), console=Console(quiet=True))
    for_training = [was_ready for for_evaluation, was_ready in calls if not for_evaluation]
    assert calls[0] == (True, False), "it was to be evaluated first"
    assert for_training and not any(for_training)


AND_TELL_OF_THE_GROUP = """\
import atexit
import runpy

import torch

atexit.register(lambda: print("in a process group:", torch.distributed.is_initialized()))
runpy.run_module("rankwise", run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_train_as_one_after_measuring_how_good_the_model_is_before(
    recipe: Path, tmp_path: Path
) -> None:
    """Accelerate leaves a model unconnected if it was evaluated first: each process would then train its own."""
    alone = train(load_recipe(recipe), console=Console(quiet=True))
    together = tmp_path / "together"
    overrides = [f"output={together}", "training.per_device_train_batch_size=4"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = tmp_path / "command.py"
    command.write_text(AND_TELL_OF_THE_GROUP)
    done = subprocess.run(
        [*launcher, str(command), "train", str(recipe), *overrides],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Saved to") == 1
    assert done.stdout.count("in a process group: False") == 2, "a process may abort if it ends in its group"

    def read(folder: Path) -> dict[str, Any]:
        return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))

    one, two = read(alone.folder), read(together)
    assert two["before"] == pytest.approx(one["before"], rel=1e-5)
    assert two["after"] == pytest.approx(one["after"], rel=1e-3)
    losses = [[entry["loss"] for entry in each["log"] if "loss" in entry] for each in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (alone.folder, together))
    assert {name: tensor.shape for name, tensor in first.items()} == {
        name: tensor.shape for name, tensor in second.items()
    }
