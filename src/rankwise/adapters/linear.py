"""Adapters for ``nn.Linear`` and for Transformers' ``Conv1D``, which is a linear layer with a transposed weight."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.branch import (
    Down,
    ScaledUp,
    Up,
    add_up,
    apply_of,
    autocast_dtype,
    by_hand,
    hidden_of,
    only_backward,
)
from rankwise.adapters.fused import How, Packed, adapted_linear, is_frozen
from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.ready import ready, shared_cast
from rankwise.parallel.ddp import keep_in_graph, note_use

_down, _up = apply_of(Down), apply_of(Up)
AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that autocast casts


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, E: Tensor | None, B: Tensor, scaling: float
) -> Tensor:
    """The output of an adapted linear layer, without dropout. All the rest of this file is about computing it fast.

    Args:
        x: (..., d_in).
        weight: the base layer's, (d_out, d_in).
        bias: the base layer's, (d_out,), or None.
        A: (r, d_in).
        E: AdaLoRA's gates, (r, 1); None for plain LoRA.
        B: (d_out, r).
        scaling: the adapter's scale.

    Returns:
        (..., d_out).

    Example:
        >>> x, weight, A, B = torch.ones(4), torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2)
        >>> reference(x, weight, None, A, None, B, scaling=0.5)
        tensor([8., 8., 8.])
    """
    hidden = x @ (A if E is None else E * A).T
    return F.linear(x, weight, bias) + scaling * hidden @ B.T


class LinearAdapters(AdapterLayer):
    """For ``nn.Linear``: weight (d_out, d_in).

    An adapter computes in the dtypes that the layer's input and output have, or in its `adapter_compute_dtype`.
    """

    called = "Linear"
    in_all_linear = True

    @classmethod
    def adapts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    @classmethod
    def factor_shapes(cls, layer: Any, rank: int, adalora: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        return (rank, layer.in_features), (layer.out_features, rank)

    @property
    def makes_new_tensors(self) -> bool:
        """Whether nobody else holds the base layer's output and the gradient of its input."""
        return self._original_class is nn.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self._active_unmerged()
        if not names or not self._by_hand(names):
            return super().forward(x, *args, **kwargs)
        dtype = autocast_dtype(x)
        acting = names if len(names) == 1 and self.acts(names[0]) else [n for n in names if self.acts(n)]
        if dtype is not None and acting and x.dtype != dtype:
            x = self._as_autocast_reads(x, dtype)
        if len(names) == len(acting) == 1 and not args and not kwargs:
            A = self.factor("lora_A", acting[0])
            if self._in_one_step(x, A, dtype):
                return self._adapted(x, A, acting[0], dtype)
        hidden = {}
        for name in acting:
            x, hidden[name] = self._down(x, name)
        output = self.base_forward(x, *args, **kwargs)
        for name in names:
            if name in hidden:
                output = self._up(output, hidden[name], name)
            else:
                output = keep_in_graph(output, self._trained_here(name))
        return output

    def _as_autocast_reads(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The input, cast to autocast's ``dtype`` if the base layer casts it, too. Both then share the cast."""
        return shared_cast(x, dtype) if x.dtype in AUTOCAST and self._reads_under_autocast(dtype) else x

    def _reads_under_autocast(self, dtype: torch.dtype) -> bool:
        """Whether the base layer casts its input to autocast's ``dtype``. Casting before it then changes nothing."""
        return self._original_class is nn.Linear

    def _by_hand(self, names: list[str]) -> bool:
        """Whether to compute with `Down` and `Up`. Compilers and transforms need an ordinary composition instead."""
        if not by_hand():
            return False
        return not (self.adapter_compute_dtype and any(name in self.adapter_compute_dtype for name in names))

    def _in_one_step(self, x: Tensor, A: Tensor, autocast: torch.dtype | None) -> bool:
        """Whether only x and the factors need gradients, and nothing is unusual."""
        weight: Any = self._parameters.get("weight")
        return (
            torch.is_grad_enabled()
            and type(x) is Tensor
            and is_frozen(weight, self._parameters.get("bias"))
            and A.requires_grad  # or x need not be saved
            and self._takes_one_step(x, weight, autocast)
        )

    def _takes_one_step(self, x: Tensor, weight: nn.Parameter, autocast: torch.dtype | None) -> bool:
        """Whether the base layer can be a part of such a step."""
        if self._original_class is not nn.Linear or type(weight) is not nn.Parameter:
            return False
        return autocast is None or x.dtype in AUTOCAST and weight.dtype in AUTOCAST

    def _packed(self, x: Tensor) -> Packed | None:
        """The base layer, if its weight is packed."""
        return None

    def _adapted(self, x: Tensor, A: Tensor, name: str, autocast: torch.dtype | None) -> Tensor:
        """The layer's output with the adapter's update, in one step of autograd."""
        weight: Any = self._parameters["weight"]
        packed, kept = self._packed(x), self.kept.get(name)
        rate = self.dropout_rate[name] if self.training else 0.0
        E, B = self.factor("lora_E", name), self.factor("lora_B", name)
        goes_up = x.dtype if packed else autocast or weight.dtype
        folded, gates = ready(self, name, "lora_A", A, E, x.dtype)
        up, _ = ready(self, name, "lora_B", B, E, goes_up)
        bias = self._parameters.get("bias")
        how = How(packed or weight, bias, kept, folded, gates, up, self.scaling[name], rate, autocast)
        output: Tensor = adapted_linear(x, A, E, B, how)
        return output

    def _down(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        kept, rate = self.kept.get(name), self.dropout_rate[name] if self.training else 0.0
        A, E = self.factor("lora_A", name), self.factor("lora_E", name)
        folded, gates = ready(self, name, "lora_A", A, E, x.dtype)
        if not torch.is_grad_enabled():
            note_use(self._trained_here(name))
            return x, hidden_of(x, folded if kept is None else folded[_places(kept)], rate)[0]
        down: tuple[Tensor, Tensor] = _down(x, A, E, kept, folded, gates, rate, self.makes_new_tensors)
        return down

    def _up(self, output: Tensor, hidden: Tensor, name: str) -> Tensor:
        scaling, kept = self.scaling[name], self.kept.get(name)
        B = self.factor("lora_B", name)
        made, _ = ready(self, name, "lora_B", B, self.factor("lora_E", name), output.dtype)
        if not torch.is_grad_enabled():
            made = made if kept is None else made[:, _places(kept)]
            return add_up(output, hidden.to(output.dtype), made, None, scaling, self.makes_new_tensors)
        up: Tensor = _up(output, hidden, B, kept, made, scaling, self.makes_new_tensors)
        return up

    def add_adapter_output(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        """``output`` (..., d_out) plus the adapter's output for ``x`` (..., d_in)."""
        A, B = self.factors(name)
        scaling, dtype = self.scaling[name], self.adapter_compute_dtype.get(name)
        with torch.autocast(x.device.type, enabled=False) if dtype else nullcontext():
            x = F.dropout(x.to(dtype or x.dtype), self.dropout_rate[name], self.training)
            hidden = F.linear(x, A.to(x.dtype))
            if dtype:
                added = F.linear(hidden * scaling, B.to(dtype))
                return (output + added).to(output.dtype)  # rounded once
        hidden, width = hidden.to(output.dtype), output.shape[-1]
        compiling = torch.compiler.is_compiling()
        if compiling or torch._C._is_tracing():  # a compiler fuses this with the operations around it
            if compiling and only_backward():
                # A scale that has changed will change again. As a number, it would be compiled anew each time.
                scale = self.changed_scale.get(name, scaling)
                update: Tensor = ScaledUp.apply(hidden, B, scale)  # type: ignore[no-untyped-call]
            else:
                update = F.linear(hidden, B.to(output.dtype)) * scaling
            return output + update
        added = torch.addmm(
            output.reshape(-1, width), hidden.reshape(-1, B.shape[1]), B.to(output.dtype).T, alpha=scaling
        )
        return added.view_as(output)


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

    @property
    def makes_new_tensors(self) -> bool:
        return True  # only this class is adapted, not its subclasses

    def shape_like_weight(self, delta: Tensor) -> Tensor:
        return delta.T


def _places(kept: int | Tensor) -> slice | Tensor:
    """The slice or the indices of the triplets that act."""
    return slice(kept) if isinstance(kept, int) else kept
