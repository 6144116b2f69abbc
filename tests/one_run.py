"""One short AdaLoRA run through all three phases, for tests that repeat it in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankwise as rw
from tiny import llama, token_batches

STEPS = 10
BATCH = 8
SOURCES = Path(__file__).parent / "distributed"


def adapted(
    model: nn.Module | None = None, before: Callable[[nn.Module], Any] | None = None, **changes: Any
) -> Any:
    """A tiny Llama (or ``model``) with an adapter. ``before`` is called with the base model."""
    model = llama() if model is None else model
    if before:
        before(model)
    fields = dict(
        init_r=4,
        target_r=0.75,  # small enough that some layers end at rank 0
        lora_alpha=8,
        total_step=STEPS,
        tinit=2,
        tfinal=4,
        deltaT=1,
        target_modules="all-linear",
    )
    torch.manual_seed(5)
    return rw.get_peft_model(model, rw.AdaLoraConfig(**{**fields, **changes})).train()


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def batches(share: int = 0, of: int = 1) -> list[dict[str, torch.Tensor]]:
    """The run's batches, or the part of each batch that process ``share`` of ``of`` gets."""
    rows = slice(share * BATCH // of, (share + 1) * BATCH // of)
    return [{k: v[rows] for k, v in batch.items()} for batch in token_batches(STEPS, size=BATCH)]


def train(
    forward: nn.Module, optimizer: torch.optim.Optimizer, data: list[dict[str, torch.Tensor]]
) -> list[float]:
    """Train on ``data``. Return each step's loss."""
    losses = []
    for batch in data:
        loss = forward(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def halves(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The two halves of a process's part of a batch."""
    return [{key: value[2 * half : 2 * half + 2] for key, value in batch.items()} for half in (0, 1)]


def train_accumulating(
    forward: Any, optimizer: torch.optim.Optimizer, data: list[dict[str, torch.Tensor]]
) -> list[float]:
    """Train as `train` does, with each batch in two halves, the first under DDP's ``no_sync``."""
    losses = []
    for batch in data:
        total = 0.0
        for number, half in enumerate(halves(batch)):
            with forward.no_sync() if number == 0 else nullcontext():
                loss = forward(**half).loss / 2
                loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def train_with_half_the_layers(
    forward: nn.Module, model: Any, data: list[dict[str, torch.Tensor]]
) -> list[float]:
    """Train as `train` does, but every other step uses the first layer only. ``forward`` may wrap ``model``."""
    layers, optimizer = model.model.layers, optimizer_for(model)
    losses = []
    for step, batch in enumerate(data):
        model.model.layers = layers[:1] if step % 2 else layers
        losses += train(forward, optimizer, [batch])
    model.model.layers = layers
    return losses


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
)
ACCELERATE_FSDP = (
    *(word for word in ACCELERATE if word != "--multi_gpu"),
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"),
)


def launch(script: str, *arguments: object, with_: tuple[str, ...] = TORCHRUN) -> str:
    """Run ``tests/distributed/<script>`` in two processes. Return their output.

    ``with_``: the words before the script's name.
    """
    return run_command(*with_, str(SOURCES / script), *map(str, arguments))


def run_command(*command: str) -> str:
    """Run a command that starts processes of its own. Return their output."""
    path = [str(Path(rw.__file__).parents[1]), str(SOURCES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONWARNINGS": "ignore",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
