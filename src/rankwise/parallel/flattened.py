"""Models under FSDP version 1 (``FullyShardedDataParallel``), which flattens parameters and splits them into pieces.

Plain LoRA trains under it, because plain LoRA needs no whole rows. Methods that need whole matrices are refused.
"""

from __future__ import annotations

from torch import nn

from rankwise.parallel.sharded import shared_out


def flattened(model: nn.Module) -> bool:
    """Whether FSDP version 1 holds the model's parameters. Version 2 also marks modules, but has DTensors."""
    managed = any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())
    return managed and not shared_out(model)


def refuse_flattened(model: nn.Module, method: str, mend: str) -> None:
    """Refuse a method that needs whole weights.

    Args:
        model: the model.
        method: name of the method, for the message.
        mend: a sentence for the message that says what to do instead.

    Raises:
        ValueError: FSDP version 1 holds the model.
    """
    if flattened(model):
        raise ValueError(
            f"`{method}` can't read a model that FullyShardedDataParallel (FSDP version 1) has flattened. {mend}"
        )
