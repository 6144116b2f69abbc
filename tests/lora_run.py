"""The run of `one_run` on PEFT's own layers."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

import rankwise as rw
from one_run import STEPS, batches, optimizer_for, train
from tiny import llama

SCHEDULE: dict[str, Any] = {"total_step": STEPS, "tinit": 2, "tfinal": 4, "deltaT": 1}
TARGET = 0.75  # small enough that some layers end at rank 0


def with_lora(model: nn.Module | None = None) -> Any:
    """A tiny Llama with PEFT's LoRA on all its linear layers."""
    model = llama() if model is None else model
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return peft.get_peft_model(model, config).train()


def adapting() -> tuple[Any, rw.AdaptiveRanks]:
    """The model, and the handle of its run."""
    model = with_lora()
    return model, rw.adapt_ranks(model, target_r=TARGET, **SCHEDULE)


def in_one_process() -> tuple[Any, rw.AdaptiveRanks, list[float]]:
    """The whole run in one process, with the whole batch."""
    model, ranks = adapting()
    return model, ranks, train(model, optimizer_for(model), batches())
