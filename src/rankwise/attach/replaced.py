"""Detects adapted modules that were replaced: without them, training would change other parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rankwise.adapters.owner import SLOTS
from rankwise.parallel.wrappers import WRAPPERS

# Modules that may have been inserted between a module and its name since the adapter was attached.
_BETWEEN = (*WRAPPERS, SLOTS)


def check_in_place(model: nn.Module, layers: Mapping[str, nn.Module], in_pass: bool = False) -> None:
    """Check that each adapted module is still where it was when the adapter was attached.

    The check takes a few dictionary look-ups per layer, so it can run at every step.

    Args:
        model: the adapted model.
        layers: modules by path, as `adapter_layers` and `saved_modules` returned them at that time.
        in_pass: whether a forward pass is about to begin. A model may leave layers out of a pass for a while, so a
            path without any module is then not an error.

    Raises:
        ValueError: a module is no longer part of the model. The message names it.

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
    # A wrapper that is not among `WRAPPERS` may have given a module a longer path.
    held = {id(module) for module in model.modules()}
    lost = [path for path in moved if id(layers[path]) not in held]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(
            f"{lost[0]!r}{more} was replaced after the adapter was attached, so what the adapter has learned there is "
            "no longer part of the model. Change the model first (`resize_token_embeddings`, quantization, a new "
            "head) and attach the adapter then; or put the adapted module back where it was."
        )


def _is_at(model: nn.Module, path: str, layer: nn.Module) -> bool | None:
    """Whether ``layer`` is at ``path``. None if no module is there."""
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
