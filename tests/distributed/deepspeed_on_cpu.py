"""DeepSpeed without what it would compile."""

from __future__ import annotations

import importlib


def prepare() -> None:
    """To be called before DeepSpeed opens its connections: gloo is enough, and takes no compiler and no minute."""
    communication = importlib.import_module(
        "deepspeed.comm.torch"
    )  # the attribute of that name is PyTorch itself
    communication.build_shm_op = lambda: None
