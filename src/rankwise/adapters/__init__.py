"""Adapters, one file for each kind of base layer: a base layer's input in, its output out."""

from __future__ import annotations

from torch import nn

from rankwise.adapters.inplace import add_methods, has_forward_of_its_own, remove_methods
from rankwise.adapters.kinds import KINDS, adapters_for, factor_name, in_all_linear, kinds_in_words
from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.parameter import ParameterSlot, slot_of

__all__ = [
    "KINDS",
    "AdapterLayer",
    "ParameterSlot",
    "adapters_for",
    "factor_name",
    "in_all_linear",
    "kinds_in_words",
    "prepare_layer",
    "restore_layer",
    "slot_of",
]


def prepare_layer(layer: nn.Module) -> AdapterLayer:
    """Turn ``layer`` into an `AdapterLayer` in place, with no adapters yet."""
    if not isinstance(layer, AdapterLayer):
        mixin = adapters_for(layer)
        if mixin is None:
            raise ValueError(f"A {type(layer).__name__} can't be adapted.")
        if has_forward_of_its_own(layer):
            raise ValueError(
                f"The `forward` of this {type(layer).__name__} has been replaced on the object itself, which would "
                "hide an adapter. Give the layer a class of its own instead, or name it in `exclude_modules`."
            )
        mixin.prepare(layer)  # type: ignore[arg-type]
        add_methods(layer, mixin)
    return layer  # type: ignore[return-value]


def restore_layer(layer: AdapterLayer) -> None:
    """Give the layer its class back and forget its adapters."""
    mixin: type[AdapterLayer] = type(layer)._mixin
    remove_methods(layer)
    mixin.clean(layer)
