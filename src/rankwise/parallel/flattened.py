"""What FSDP version 1 (``FullyShardedDataParallel``) leaves of parameters: pieces of a flat one.

Plain LoRA trains under it, as that needs no rows. What needs whole matrices is refused.
"""

from __future__ import annotations

from torch import nn

from rankwise.parallel.sharded import shared_out


def flattened(model: nn.Module) -> bool:
    """Whether FSDP version 1 holds the model's parameters. Version 2 marks modules too, but has DTensors."""
    managed = any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())
    return managed and not shared_out(model)


def refuse_flattened(model: nn.Module, method: str, mend: str) -> None:
    """Refuse what needs whole weights.

    Raises:
        ValueError: FSDP version 1 holds the model.
    """
    if flattened(model):
        raise ValueError(
            f"`{method}` can't read a model that FullyShardedDataParallel (FSDP version 1) has flattened. {mend}"
        )
