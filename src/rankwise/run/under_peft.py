"""Detects an adapter of PEFT on top of rankwise's: PEFT freezes all parameters that are not its own."""

from __future__ import annotations

from torch import nn

FROZEN_BY_PEFT = (
    "The model has rankwise's own layers, and PEFT has put an adapter on top of them. PEFT freezes all parameters that "
    "are not its own, so rankwise's adapter does not train, and its ranks do not change."
)


def parameters_of_peft(model: nn.Module) -> set[int]:
    """The ids of the parameters that PEFT's layers have added to ``model``.

    PEFT is not imported. Its layers are recognized by the module in which their classes are defined.
    """
    found: set[int] = set()
    for module in model.modules():
        if any(cls.__module__.startswith("peft.tuners.") for cls in type(module).__mro__):
            for name, child in module.named_children():
                if name not in ("base_layer", "model"):
                    found |= {id(parameter) for parameter in child.parameters()}
    return found
