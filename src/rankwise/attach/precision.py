"""The precision of an adapter's values: float32, or the half precision of the layers that it adapts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankwise.attach.attachment import Attachment, Factors
from rankwise.attach.parameters import layer_at

_HALF = (torch.float16, torch.bfloat16)


def in_base_dtype(model: nn.Module, attachment: Attachment) -> Attachment:
    """Convert an adapter's values to half precision where the layer's weight has half precision.

    Modules that train in full also keep the precision of the base model.

    Args:
        model: model that the adapter was made for.
        attachment: the adapter, which is not changed.

    Raises:
        ValueError: a value is too large for half precision.
    """
    layers = {path: _cast(path, layer_at(model, path), own) for path, own in attachment.layers.items()}
    return replace(attachment, layers=layers, widens=False)


def _cast(path: str, layer: nn.Module, own: Factors) -> Factors:
    dtype = getattr(getattr(layer, "weight", None), "dtype", None)
    if dtype not in _HALF:
        return own
    factors: Mapping[str, Tensor | None] = {"A": own.A, "B": own.B, "E": own.E}
    made = {name: None if value is None else value.to(dtype) for name, value in factors.items()}
    for name, value in made.items():
        before = factors[name]
        if value is not None and before is not None and value.isinf().any() and not before.isinf().any():
            raise ValueError(
                f"lora_{name} of {path!r} has values beyond what {dtype} can hold, up to {before.abs().max():.3g}: "
                "leave `autocast_adapter_dtype` at True, which keeps the adapter in float32."
            )
    return replace(own, **made)  # type: ignore[arg-type]
