"""Adapted modules that somebody has replaced: a model that trains on without them trains something else."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rankwise.adapters.owner import SLOTS
from rankwise.parallel.wrappers import WRAPPERS

# What may lie between a module and its name since the adapter was attached.
_BETWEEN = (*WRAPPERS, SLOTS)


def check_in_place(model: nn.Module, layers: Mapping[str, nn.Module], in_pass: bool = False) -> None:
    """See that each adapted module is still where it was when the adapter was attached.

    It costs a few dictionary look-ups a layer, so that it can be called at every step.

    Args:
        model: the adapted model.
        layers: the modules by path, as `adapter_layers` and `saved_modules` gave them then.
        in_pass: a pass is about to begin. It may leave layers out: what is not there at all may come back.

    Raises:
        ValueError: one of them is no part of the model any more; the message names it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> layers = {"0": model[0]}
        >>> check_in_place(model, layers)
        >>> model[0] = nn.Linear(2, 2)
        >>> check_in_place(model, layers)
        Traceback (most recent call last):
            ...
        ValueError: '0' was replaced after the adapter was attached...
    """
    places = {path: _is_at(model, path, layer) for path, layer in layers.items()}
    moved = [path for path, there in places.items() if there is False or (there is None and not in_pass)]
    if not moved:
        return
    held = {
        id(module) for module in model.modules()
    }  # a wrapper of another kind may have given it a longer path
    lost = [path for path in moved if id(layers[path]) not in held]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(
            f"{lost[0]!r}{more} was replaced after the adapter was attached, so what the adapter has learned there is "
            "no part of the model any more. Change the model first (`resize_token_embeddings`, quantization, a new "
            "head) and attach the adapter then; or put the adapted module back where it was."
        )


def _is_at(model: nn.Module, path: str, layer: nn.Module) -> bool | None:
    """Whether ``layer`` is at ``path``; None if nothing is."""
    module = model
    for name in path.split("."):
        found = _child(module, name)
        if found is None:
            return None
        module = found
    while module is not layer:
        inner = next((module._modules[name] for name in WRAPPERS if name in module._modules), None)
        if inner is None:
            return False
        module = inner
    return True


def _child(module: nn.Module, name: str) -> nn.Module | None:
    while name not in module._modules:
        between = next((each for each in _BETWEEN if each in module._modules), None)
        inner = None if between is None else module._modules[between]
        if inner is None:
            return None
        module = inner
    return module._modules[name]
