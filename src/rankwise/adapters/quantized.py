"""Adapters for quantized layers: the packed base weight stays as it is, the factors are float32.

Merging needs the base weight as numbers and back again. bitsandbytes can do both, with rounding; for other
packings merging is refused, and the message says what to do instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.branch import cast
from rankwise.adapters.fused import Packed
from rankwise.adapters.layer import cant_merge_into
from rankwise.adapters.linear import LinearAdapters


class Bnb4bitAdapters(LinearAdapters):
    """For bitsandbytes' ``Linear4bit``: weight (d_out, d_in), two numbers in a byte."""

    weight: Any

    requantizes = True

    @classmethod
    def adapts(cls, layer: nn.Module) -> bool:
        return _is_bitsandbytes(layer, "Linear4bit")

    @property
    def makes_new_tensors(self) -> bool:
        return is_of_bitsandbytes(self._original_class)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(x, *args, **kwargs)
        # The layer has the dtype of its input, which under autocast it may have read in another.
        return output.to(x.dtype) if self.makes_new_tensors and output.dtype != x.dtype else output

    def _reads_under_autocast(self, dtype: torch.dtype) -> bool:
        return self.makes_new_tensors and computes_in(self, dtype)

    def _takes_one_step(self, x: Tensor, weight: nn.Parameter, autocast: torch.dtype | None) -> bool:
        return self.makes_new_tensors and packs_4_bit(self, x)

    def _packed(self, x: Tensor) -> Packed:
        return Packed(self, self.base_forward, hold_4_bit, unpack_4_bit)

    def base_weight(self) -> Tensor:
        import bitsandbytes

        _unpack(self)
        weight = self.weight
        dense: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        return dense

    def set_base_weight(self, weight: Tensor) -> None:
        old = self.weight
        kept = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        options = {name: getattr(old, name) for name in kept}
        made = type(old)(weight.cpu(), requires_grad=False, module=self, **options)
        self.weight = made.to(old.device)

    def packed_weight(self) -> Any:
        _unpack(self)
        weight = self.weight
        return weight, weight.quant_state

    def set_packed_weight(self, packed: Any) -> None:
        weight, state = packed
        device = self.weight.device
        weight.quant_state = state  # its module has another weight now
        self.weight = weight if weight.device == device else weight.to(device)
        self.quant_state = self.weight.quant_state


class Bnb8bitAdapters(LinearAdapters):
    """For bitsandbytes' ``Linear8bitLt``: int8 weight (d_out, d_in), and a scale for each row."""

    weight: Any

    requantizes = True

    @classmethod
    def adapts(cls, layer: nn.Module) -> bool:
        return _is_bitsandbytes(layer, "Linear8bitLt")

    @property
    def makes_new_tensors(self) -> bool:
        return is_of_bitsandbytes(self._original_class)

    def _takes_one_step(self, x: Tensor, weight: nn.Parameter, autocast: torch.dtype | None) -> bool:
        return self.makes_new_tensors and packs_8_bit(self, x)

    def _packed(self, x: Tensor) -> Packed:
        return Packed(self, self.base_forward, hold_8_bit, unpack_8_bit)

    def base_weight(self) -> Tensor:
        import bitsandbytes

        weight = self.weight
        if weight.dtype != torch.int8:  # with has_fp16_weights it is packed in every forward pass
            return super().base_weight()
        dense: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, self._scales())
        return dense

    def set_base_weight(self, weight: Tensor) -> None:
        old = self.weight
        if old.dtype != torch.int8:
            super().set_base_weight(weight)
            return
        self._take(type(old)(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(old.device))

    def packed_weight(self) -> Any:
        weight = self.weight
        return weight, self._scales() if weight.dtype == torch.int8 else weight.data.clone()

    def set_packed_weight(self, packed: Any) -> None:
        weight, scales = packed
        if weight.dtype != torch.int8:
            weight.data.copy_(scales)
            return
        device = self.weight.device
        weight.CB, weight.SCB = weight.data, scales
        self._take(weight if weight.device == device else weight.to(device))

    def _scales(self) -> Tensor:
        weight = self.weight
        state: Any = self.state
        # The first forward pass moves the scales.
        scales: Tensor = weight.SCB if weight.SCB is not None else state.SCB
        return scales

    def _take(self, weight: Any) -> None:
        state: Any = self.state
        self.weight = weight
        state.reset_grads()
        state.CB = state.SCB = None  # the next forward pass takes the weight's own


class PackedLinearAdapters(LinearAdapters):
    """For linear layers with packed numbers in ``qweight`` instead of a ``weight``, such as GPTQ's and AWQ's."""

    @classmethod
    def adapts(cls, layer: nn.Module) -> bool:
        widths = getattr(layer, "in_features", None)
        return isinstance(getattr(layer, "qweight", None), Tensor) and isinstance(widths, int)

    @torch.no_grad()
    def check_merge(self, names: list[str], finite: bool = False) -> None:
        if self._not_yet_merged(names):
            raise ValueError(cant_merge_into(self._original_class.__name__))


def _is_bitsandbytes(layer: nn.Module, name: str) -> bool:
    return any(
        cls.__name__ == name and cls.__module__.startswith("bitsandbytes.") for cls in type(layer).__mro__
    )


@functools.cache  # every layer calls this twice in every pass
def is_of_bitsandbytes(cls: type) -> bool:
    """Whether a class is bitsandbytes' own, not derived from it."""
    return cls.__module__.startswith("bitsandbytes.")


# The weight for the backward pass of bitsandbytes' layers: the same numbers as in the layer's own backward pass.

_UNPACKED = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
)  # the dtypes in which bitsandbytes unpacks 4-bit weights


def packs_4_bit(layer: Any, x: Tensor) -> bool:
    """Whether a ``Linear4bit`` holds its weight packed, in the layout that training on ``x`` needs."""
    state = getattr(layer._parameters["weight"], "quant_state", None) or layer.quant_state
    return (
        state is not None
        and not vars(state).get("packing_format_for_cpu")
        and tuple(state.shape) == (layer.out_features, x.shape[-1])
        and x.is_floating_point()
    )


def computes_in(layer: Any, dtype: torch.dtype | None) -> bool:
    """Whether a layer of bitsandbytes casts every input to ``dtype``."""
    return bool(getattr(layer, "compute_type_is_set", False)) and layer.compute_dtype == dtype


def hold_4_bit(layer: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """What `unpack_4_bit` needs of a ``Linear4bit`` whose last input has ``dtype``."""
    weight = layer._parameters["weight"]
    return weight.data, weight.quant_state, layer.compute_dtype or dtype


def unpack_4_bit(data: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The dense weight of a ``Linear4bit``, (d_out, d_in), in ``dtype``."""
    from bitsandbytes.functional import dequantize_4bit

    if dtype in _UNPACKED and state.dtype != dtype:
        # It is unpacked in this dtype at once. Otherwise the whole dense weight would be cast.
        known, state = vars(state), object.__new__(type(state))  # in a tenth of the time of copy.copy
        vars(state).update(known, dtype=dtype)
    return cast(dequantize_4bit(data, state), dtype)


def packs_8_bit(layer: Any, x: Tensor) -> bool:
    """Whether a ``Linear8bitLt`` holds its weight packed, in the layout that training on ``x`` needs."""
    weight, state = layer.weight, layer.state
    held = state.CB if weight.CB is None else weight.CB
    return (
        weight.dtype == torch.int8
        and not state.has_fp16_weights
        and held is not None
        and x.is_floating_point()
    )


def hold_8_bit(layer: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """What `unpack_8_bit` needs of a ``Linear8bitLt`` whose last input has ``dtype``."""
    return layer.state.CB, layer.state.SCB, dtype


def unpack_8_bit(whole: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weight of a ``Linear8bitLt``, (d_out, d_in), in ``dtype``."""
    return whole.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


# On CPUs with AVX512-BF16, bitsandbytes changes the layout of 4-bit weights in evaluation. No gradient flows through
# the new layout, so layers below would not train afterwards.


def hold_layout(model: nn.Module) -> None:
    """Keep all of a model's 4-bit layers, adapted or not, in the layout that training needs."""
    for module in model.modules():
        if vars(module).get("support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            vars(module)["_rankwise_holds_layout"] = True
            _unpack(module)


def release_layout(model: nn.Module) -> None:
    """Undo `hold_layout`."""
    for module in model.modules():
        if vars(module).pop("_rankwise_holds_layout", False):
            module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]


@torch.no_grad()
def _unpack(layer: Any) -> None:
    weight = layer.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            weight.data, weight.quant_state
        )
