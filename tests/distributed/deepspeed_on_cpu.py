"""DeepSpeed without compiled parts, and the engine and training loops of the scripts that use it."""

from __future__ import annotations

import importlib
from typing import Any

from one_run import halves, optimizer_for

SHARED_OUT = 500  # elements: in stage 3 the base's matrices are sharded, but the adapter's are not


def prepare() -> None:
    """Call this before DeepSpeed opens its connections. It selects gloo, which needs no compilation."""
    communication = importlib.import_module(
        "deepspeed.comm.torch"
    )  # the attribute of this name is PyTorch itself
    communication.build_shm_op = lambda: None


def engine_of(model: Any, stage: int, optimizer: Any = None, zero: Any = None, **fields: Any) -> Any:
    """The engine that trains ``model``; ``zero`` and ``fields`` change DeepSpeed's configuration."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,  # by default DeepSpeed clips at 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": SHARED_OUT,
            **(zero or {}),
        },
        **fields,
    }
    optimizer = optimizer or optimizer_for(model)
    return importlib.import_module("deepspeed").initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, data: Any) -> list[float]:
    losses = []
    for batch in data:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def train_in_halves(engine: Any, data: Any) -> list[float]:
    """Train as `train` does, with an engine that accumulates two gradients: each batch is split in half."""
    losses = train(engine, [half for batch in data for half in halves(batch)])
    return [sum(losses[i : i + 2]) / 2 for i in range(0, len(losses), 2)]
