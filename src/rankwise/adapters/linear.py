"""Adapters for ``nn.Linear`` and for Transformers' ``Conv1D``, which is a linear layer with a transposed weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.adapters.layer import AdapterLayer


class LinearAdapters(AdapterLayer):
    """For ``nn.Linear``: weight (d_out, d_in)."""

    def adapter_widths(self, lora_groups: bool) -> tuple[int, int]:
        return self.in_features, self.out_features  # type: ignore[return-value]

    def add_adapter_output(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        """``output`` (..., d_out) plus the adapter's output for ``x`` (..., d_in)."""
        A, B = self.factors(name)
        hidden = F.linear(self._adapter_input(x, name), A)
        scaling = self.scaling[name]
        if output.dtype != hidden.dtype:
            return output + (F.linear(hidden, B) * scaling).to(output.dtype)
        added = torch.addmm(output.reshape(-1, output.shape[-1]), hidden.flatten(0, -2), B.T, alpha=scaling)
        return added.view(output.shape)


class Conv1DAdapters(LinearAdapters):
    """For ``transformers.pytorch_utils.Conv1D``: weight (d_in, d_out)."""

    def adapter_widths(self, lora_groups: bool) -> tuple[int, int]:
        d_in, d_out = self.base_weight().shape
        return d_in, d_out

    def shape_like_weight(self, delta: Tensor) -> Tensor:
        return delta.T
