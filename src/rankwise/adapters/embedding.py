"""Adapters for ``nn.Embedding``."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.layer import AdapterLayer


class EmbeddingAdapters(AdapterLayer):
    """For ``nn.Embedding``: weight (entries, d_out); A is (r, entries), B (d_out, r)."""

    def adapter_widths(self, lora_groups: bool) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim  # type: ignore[return-value]

    def add_adapter_output(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        """``output`` (..., d_out) plus the adapter's output for the indices ``x`` (...)."""
        A, B = self.factors(name)
        rows = F.embedding(x, A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)  # type: ignore
        return (output + F.linear(rows * self.scaling[name], B)).to(output.dtype)

    def shape_like_weight(self, delta: Tensor) -> Tensor:
        return delta.T

    def reset_factors(self, A: Tensor, B: Tensor, gaussian: bool) -> None:
        """An embedding starts with A = 0 and B normal, as its A is looked up and not multiplied."""
        nn.init.zeros_(A)
        nn.init.normal_(B)
