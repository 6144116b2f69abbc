"""DeepSpeed without what it would compile, and the engine and the loop of the scripts that train with it."""

from __future__ import annotations

import importlib
from typing import Any

from one_run import halves, optimizer_for

SHARED_OUT = 500  # elements: the base's matrices are shared out in stage 3, and the adapter's are not


def prepare() -> None:
    """To be called before DeepSpeed opens its connections: gloo is enough, and takes no compiler and no minute."""
    communication = importlib.import_module(
        "deepspeed.comm.torch"
    )  # the attribute of that name is PyTorch itself
    communication.build_shm_op = lambda: None


def engine_of(model: Any, stage: int, optimizer: Any = None, zero: Any = None, **fields: Any) -> Any:
    """The engine that trains ``model``; ``zero`` and ``fields`` change DeepSpeed's configuration."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 if nothing is said
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
    """As `train`, for an engine that accumulates two gradients; each batch goes in two halves."""
    losses = train(engine, [half for batch in data for half in halves(batch)])
    return [sum(losses[i : i + 2]) / 2 for i in range(0, len(losses), 2)]
