"""Adapters for ``nn.Linear`` and for Transformers' ``Conv1D``, which is a linear layer with a transposed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from rankwise.adapters.layer import AdapterLayer


class LinearAdapters(AdapterLayer):
    """For ``nn.Linear``: weight (d_out, d_in)."""

    called = "Linear"
    in_all_linear = True

    @classmethod
    def adapts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    @classmethod
    def factor_shapes(cls, layer: Any, rank: int, adalora: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        return (rank, layer.in_features), (layer.out_features, rank)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._fusable(x)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        A, B = self.factors(name)
        fused: Tensor = _FusedLinear.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, A, B, self.scaling[name]
        )
        return fused

    def _fusable(self, x: Tensor) -> str | None:
        """The one adapter that acts, if base layer and adapter can be computed in one go."""
        if not self.adapters_enabled or self.merged_adapters or len(self.active_adapters) != 1:
            return None
        name, weight = self.active_adapters[0], self.weight
        plain = self._original_class is nn.Linear and type(weight) in (nn.Parameter, Tensor)
        if not plain or not self.acts(name) or (self.training and self.dropout_rate[name]):
            return None
        if weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return None
        if (
            torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        ):  # vmap, jvp and the like
            return None
        if not x.dtype == weight.dtype == self.lora_A[name].dtype or torch.is_autocast_enabled(x.device.type):
            return None
        return name

    def add_adapter_output(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        """``output`` (..., d_out) plus the adapter's output for ``x`` (..., d_in)."""
        A, B = self.factors(name)
        hidden = F.linear(self._adapter_input(x, name), A)
        scaling = self.scaling[name]
        if output.dtype != hidden.dtype:
            return (output + F.linear(hidden * scaling, B)).to(output.dtype)  # rounded once, as in PEFT
        width = output.shape[-1]
        added = torch.addmm(output.reshape(-1, width), hidden.reshape(-1, B.shape[1]), B.T, alpha=scaling)
        return added.view(output.shape)


class Conv1DAdapters(LinearAdapters):
    """For ``transformers.pytorch_utils.Conv1D``: weight (d_in, d_out)."""

    called = "Transformers' Conv1D"

    @classmethod
    def adapts(cls, layer: nn.Module) -> bool:
        kind = type(layer)
        return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"

    @classmethod
    def factor_shapes(cls, layer: Any, rank: int, adalora: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        d_in, d_out = layer.weight.shape
        return (rank, d_in), (d_out, rank)

    def shape_like_weight(self, delta: Tensor) -> Tensor:
        return delta.T


class _FusedLinear(torch.autograd.Function):
    """``x W^T + bias + scaling * (x A^T) B^T`` with frozen W and bias, in as few passes over x as it takes.

    Written as a composition, the output and the input's gradient would each be made twice and added.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        output = F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        hidden = flat @ A.T
        output.view(-1, output.shape[-1]).addmm_(hidden, B.T, alpha=scaling)
        ctx.save_for_backward(x, weight, A, B, hidden)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, hidden = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # for a second derivative, as the one kept knows nothing of x and A
            hidden = flat @ A.T
        gradient = gradient.reshape(-1, gradient.shape[-1])
        to_x, _, _, to_A, to_B, _ = ctx.needs_input_grad
        gradient_x = gradient_A = gradient_B = None
        if to_B:
            gradient_B = (gradient.T @ hidden).mul_(ctx.scaling)
        if to_x or to_A:
            gradient_hidden = (gradient @ B).mul_(ctx.scaling)
            if to_A:
                gradient_A = gradient_hidden.T @ flat
            if to_x:
                gradient_x = (gradient @ weight).addmm_(gradient_hidden, A).view(x.shape)
        return gradient_x, None, None, gradient_A, gradient_B, None
