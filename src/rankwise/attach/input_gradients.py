"""Lets gradients pass through re-entrant gradient checkpoints.

PyTorch's re-entrant checkpoint passes gradients only if one of its inputs requires a gradient. With a frozen base no
input does. The adapters inside would then get no gradient, or the loss would have none. So the outputs of the
embeddings and the inputs of each checkpointed block are made to require a gradient. Checkpoints that are not
re-entrant do not need this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankwise.attach.embeddings import input_embeddings


def checkpointing_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of Transformers' kind that can checkpoint their content, whether or not they do so now."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def any_reentrant(modules: Iterable[Any]) -> bool:
    """Whether one of `checkpointing_modules` uses PyTorch's re-entrant checkpoints."""
    for module in modules:
        if module.gradient_checkpointing:
            options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if options.get("use_reentrant", True) is not False:
                return True
    return False


def hook_inputs(model: nn.Module, modules: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Let the first inputs require a gradient in training, while gradients are computed.

    A module that contains other such modules gets no hook of its own, because some change ``requires_grad`` of their
    inputs.

    Args:
        model: model whose embeddings get hooks.
        modules: the model's `checkpointing_modules`.

    Returns:
        Handles that remove the hooks.
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
    """Let the first floating-point tensor among ``values`` require a gradient, unless one of them does already."""
    places = [
        place for place, value in enumerate(values) if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not torch.is_grad_enabled() or not places or any(values[place].requires_grad for place in places):
        return values
    first = values[places[0]].detach().requires_grad_(True)  # the tensor itself may be the user's
    return (*values[: places[0]], first, *values[places[0] + 1 :])
