"""PEFT's LoRA layers of linear maps, computed as rankwise computes its own: a layer and its adapter in one step.

`FastLoraLayer` goes on top of a layer's class in place. It computes what PEFT computes for one plain adapter that is
active and not merged. For anything else it calls PEFT's own forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from rankwise.adapters.branch import add_up, autocast_dtype, by_hand, hidden_of
from rankwise.adapters.fused import How, Packed, adapted_linear, is_frozen
from rankwise.adapters.inplace import InPlace
from rankwise.adapters.linear import AUTOCAST
from rankwise.adapters.quantized import (
    computes_in,
    hold_4_bit,
    hold_8_bit,
    is_of_bitsandbytes,
    packs_4_bit,
    packs_8_bit,
    unpack_4_bit,
    unpack_8_bit,
)
from rankwise.adapters.ready import is_whole, ready, shared_cast

_FACTORS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # dtypes
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Parts(NamedTuple):
    """The inputs of one pass through a layer."""

    name: str
    base: Any
    A: nn.Parameter
    B: nn.Parameter
    rate: float
    scaling: float


class FastLoraLayer(InPlace):
    """Mixin for PEFT's ``Linear``, ``Linear4bit`` and ``Linear8bitLt`` with LoRA."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs and _is_ordinary(x):
            parts = self._parts()
            if parts is not None:
                made = self._computed(x, parts)
                if made is not None:
                    return made
        output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return output

    def factor(self, key: str, name: str) -> Any:
        """`lora_A` or `lora_B` of adapter ``name``, as in rankwise's own layers. None if it has no such factor."""
        if key == "lora_E":
            return None
        held: Any = self._modules[key]._modules.get(name)  # type: ignore[attr-defined]
        return None if held is None else held._parameters.get("weight")

    # One pass.

    def _parts(self) -> _Parts | None:
        """The base layer and the one adapter that acts on it. None: PEFT's own forward is needed."""
        layer: Any = self
        modules = layer._modules
        if layer._disable_adapters or layer.merged_adapters:
            return None
        active = layer._active_adapter
        names = [active] if isinstance(active, str) else active
        held = modules["lora_A"]._modules
        acting = [name for name in names if name in held]
        if len(acting) != 1 or acting[0] in layer.lora_variant:
            return None
        name = acting[0]
        base, down, up = modules["base_layer"], held[name], modules["lora_B"]._modules[name]
        dropout, scaling = modules["lora_dropout"]._modules[name], layer.scaling[name]
        if not (_is_bare(base) and _is_bare(down, nn.Linear) and _is_bare(up, nn.Linear)):
            return None
        if not (_is_bare(dropout, nn.Identity) or _is_bare(dropout, nn.Dropout) and not dropout.inplace):
            return None
        A, B = down._parameters.get("weight"), up._parameters.get("weight")
        if down._parameters.get("bias") is not None or up._parameters.get("bias") is not None:
            return None
        if not (is_whole(A) and is_whole(B) and {A.dtype, B.dtype} <= _FACTORS):
            return None
        if not (A.numel() and type(scaling) in (float, int)):
            return None
        rate = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        return _Parts(name, base, A, B, rate, scaling)

    def _computed(self, x: Tensor, parts: _Parts) -> Tensor | None:
        """The layer's output with the adapter's update. None: PEFT's own forward is needed."""
        layer: Any = self
        name, base, A, B, rate, scaling = parts
        dtype, autocast = x.dtype, autocast_dtype(x)
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if not is_frozen(weight, bias):
            return None
        packed = None
        casts = autocast is not None and dtype != autocast
        if type(base) is nn.Linear:
            if type(weight) is not nn.Parameter or weight.dtype not in _FACTORS:
                return None
            if autocast is None and weight.dtype != dtype:
                return None
            if autocast is not None and not (dtype in AUTOCAST and weight.dtype in AUTOCAST):
                return None
        else:
            packed = _packed(base, x)
            if packed is None:
                return None
            # Besides this, a 4-bit layer's output does not depend on the dtype of its input.
            casts = casts and computes_in(base, autocast)
        if torch.is_grad_enabled():
            if not A.requires_grad:
                return None
            if casts:
                x = shared_cast(x, autocast)  # type: ignore[arg-type]
            folded, _ = ready(layer, name, "lora_A", A, None, x.dtype)
            up, _ = ready(layer, name, "lora_B", B, None, x.dtype if packed else autocast or weight.dtype)
            how = How(packed or weight, bias, None, folded, None, up, scaling, rate, autocast)
            output: Tensor = adapted_linear(x, A, None, B, how)
        else:
            if casts:
                x = shared_cast(x, autocast)  # type: ignore[arg-type]
            hidden = hidden_of(x, ready(layer, name, "lora_A", A, None, x.dtype)[0], rate)[0]
            output = base.forward(x)
            up, _ = ready(layer, name, "lora_B", B, None, output.dtype)
            output = add_up(output, hidden.to(output.dtype), up, None, scaling, in_place=True)
        return output.to(dtype) if packed and casts else output


def _is_ordinary(x: Any) -> bool:
    """Whether an input is a plain tensor, and no compiler or transform is at work."""
    return type(x) is Tensor and x.dtype in _FACTORS and by_hand() and not nn_module._has_any_global_hook()


def _is_bare(module: Any, kind: type | None = None) -> bool:
    """Whether calling a module runs the forward of its class ``kind`` and nothing else."""
    held = vars(module)
    return (
        (kind is None or type(module) is kind)
        and "forward" not in held
        and held.get("_compiled_call_impl") is None
        and not any(map(held.__getitem__, _HOOKS))
    )


def _packed(base: Any, x: Tensor) -> Packed | None:
    """A base layer of bitsandbytes, if its weight is packed in the layout that training on ``x`` needs."""
    cls: type = type(base)
    if not is_of_bitsandbytes(cls):
        return None
    if any(each.__name__ == "Linear4bit" for each in cls.__mro__):
        repacks = base.support_avx512bf16_for_cpu if hasattr(base, "support_avx512bf16_for_cpu") else False
        if not packs_4_bit(base, x) or (repacks and not base.training):  # evaluation uses another layout
            return None
        return Packed(base, base.forward, hold_4_bit, unpack_4_bit)
    if cls.__name__ == "Linear8bitLt" and packs_8_bit(base, x):
        return Packed(base, base.forward, hold_8_bit, unpack_8_bit)
    return None
