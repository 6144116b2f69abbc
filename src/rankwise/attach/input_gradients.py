"""Lets gradients through re-entrant gradient checkpoints.

PyTorch's re-entrant checkpoint gives its output a gradient only if one of its inputs asks for one. With a frozen base
none does, and adapters inside would get no gradient, or the loss none at all. So the first inputs ask for one: what the
embeddings give out, and what goes into each checkpointed block. Checkpoints that are not re-entrant need nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankwise.attach.embeddings import input_embeddings


def checkpointing_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of Transformers' kind that can checkpoint what is in them, whether they do so now or not."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def any_reentrant(modules: Iterable[Any]) -> bool:
    """Whether one of `checkpointing_modules` checkpoints in PyTorch's re-entrant way."""
    for module in modules:
        if module.gradient_checkpointing:
            options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if options.get("use_reentrant", True) is not False:
                return True
    return False


def hook_inputs(model: nn.Module, modules: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Let the first inputs ask for a gradient in training, where gradients are computed.

    A module that has others of its kind in it is left to these: some change ``requires_grad`` of what they get.

    Args:
        model: whose embeddings are meant.
        modules: its `checkpointing_modules`.

    Returns:
        What removes the hooks again.
    """
    handles = [each.register_forward_hook(_after_embedding) for each in input_embeddings(model)]
    held = list(modules)
    among = {id(module) for module in held}
    inner = [each for each in held if not any(id(m) in among for m in each.modules() if m is not each)]
    return [*handles, *(each.register_forward_pre_hook(_before_block) for each in inner)]


def _after_embedding(module: nn.Module, inputs: Any, output: Any) -> Any:
    return _asking((output,))[0] if module.training else None


def _before_block(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return _asking(inputs) if module.training else None


def _asking(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values, of which the first floating-point tensor asks for a gradient unless one of them does already."""
    places = [
        place for place, value in enumerate(values) if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not torch.is_grad_enabled() or not places or any(values[place].requires_grad for place in places):
        return values
    first = values[places[0]].detach().requires_grad_(True)  # the tensor itself may be the user's
    return (*values[: places[0]], first, *values[places[0] + 1 :])
