"""`speed_up`: rankwise's computation under PEFT's own LoRA layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from rankwise.adapt.fast_layer import FastLoraLayer
from rankwise.adapt.peft_pairs import lora_layers
from rankwise.adapters.inplace import InPlace, add_methods, has_forward_of_its_own, remove_methods
from rankwise.adapters.ready import OncePerPass, forget

_KINDS = ("Linear", "Linear4bit", "Linear8bitLt")
_INNER = ("module", "_orig_mod")  # the attributes in which DDP and torch.compile keep the wrapped model


class _FastModel(InPlace, OncePerPass):
    """Mixin for the model: each call casts all factors once, at its start."""


def speed_up(model: nn.Module) -> SpedUp:
    """Compute the linear LoRA layers of a PEFT model as rankwise computes its own: each in one step of autograd.

    The layers, their class names, the state dictionary and all functions of PEFT stay as they are. Outputs and
    gradients are equal to rounding. With a half-precision base the adapter computes in half precision, where PEFT
    computes in float32.

    It acts where one plain LoRA adapter is active in a layer and not merged. In all other cases the layer calls PEFT's
    own forward: disabled, merged and several adapters, ``adapter_names``, DoRA and other variants, ``lora_bias``,
    modules with hooks, base weights that train, kinds of layers other than ``nn.Linear`` and bitsandbytes' 4-bit and
    8-bit layers, ``torch.compile``, ``torch.func`` and forward-mode derivatives.

    Args:
        model: a model with a LoRA adapter of PEFT. DDP or ``torch.compile`` may have wrapped it. Call this again after
            an adapter was added to layers that had none.

    Returns:
        A handle, which need not be kept. Its ``undo()`` gives PEFT's layers their own forward back. A ``with`` block on
        the handle calls ``undo()`` at its end.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no layer that can be sped up.

    Example:
        >>> import peft, torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"]))
        >>> x = torch.randn(3, 8)
        >>> before = model(x)
        >>> fast = rw.speed_up(model)
        >>> fast
        SpedUp(layers=2)
        >>> torch.testing.assert_close(model(x), before)
        >>> fast.undo()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module with a LoRA adapter of PEFT, but is a {type(model).__name__}."
        )
    layers = [layer for _, layer in lora_layers(model) if _can_be_fast(layer)]
    if not layers:
        raise ValueError(
            f"This {type(model).__name__} has no LoRA layer of PEFT that can be sped up: those of nn.Linear and of "
            "bitsandbytes' 4-bit and 8-bit layers can. Attach an adapter to such layers first, with "
            "`peft.get_peft_model(model, peft.LoraConfig(...))`. rankwise's own layers are as fast as they are."
        )
    for layer in layers:
        if not isinstance(layer, FastLoraLayer):
            add_methods(layer, FastLoraLayer)
    whole = _unwrapped(model)
    if not isinstance(whole, OncePerPass):
        add_methods(whole, _FastModel)
    return SpedUp(whole, layers)


class SpedUp:
    """The handle of layers that compute fast; `speed_up` makes it.

    As a context, it calls `undo` at the end.

    Example:
        >>> import peft, torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
        >>> with rw.speed_up(model) as fast:
        ...     _ = model(torch.randn(3, 8))
        >>> fast
        SpedUp(layers=0)
    """

    def __init__(self, model: nn.Module, layers: list[Any]) -> None:
        self._model, self._layers = model, layers

    def undo(self) -> None:
        """Give PEFT's layers their own forward back. A second call does nothing.

        Raises:
            ValueError: something else (such as ``fully_shard``) has changed a layer's class since.
        """
        for each in self._fast():
            remove_methods(each)
        forget(self._model)

    def _fast(self) -> Iterator[Any]:
        for layer in self._layers:
            if isinstance(layer, FastLoraLayer):
                yield layer
        if isinstance(self._model, _FastModel):
            yield self._model

    def __enter__(self) -> SpedUp:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"SpedUp(layers={sum(isinstance(layer, FastLoraLayer) for layer in self._layers)})"


def _can_be_fast(layer: Any) -> bool:
    if isinstance(layer, FastLoraLayer):
        return True
    cls = type(layer)
    own = cls.__module__.startswith("peft.tuners.lora.") and cls.__name__ in _KINDS
    return own and not has_forward_of_its_own(layer)


def _unwrapped(model: nn.Module) -> nn.Module:
    while any(inner in model._modules for inner in _INNER) and type(model).__name__ in (
        "DistributedDataParallel",
        "DataParallel",
        "OptimizedModule",
    ):
        model = next(model._modules[inner] for inner in _INNER if inner in model._modules)  # type: ignore[assignment]
    return model
