"""Adapters for ``nn.Embedding``."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.layer import AdapterLayer


class EmbeddingAdapters(AdapterLayer):
    """For ``nn.Embedding``: weight (entries, d_out); A is (r, entries), B (d_out, r)."""

    starts_at_zero: ClassVar[str] = "lora_A"

    called = "Embedding"
    file_prefix = "lora_embedding_"
    base_in_file = True  # as PEFT writes it when the vocabulary was resized

    @classmethod
    def adapts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    @classmethod
    def factor_shapes(cls, layer: Any, rank: int, adalora: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        return (rank, layer.num_embeddings), (layer.embedding_dim, rank)

    @classmethod
    def file_name(cls, path: str, factor: str, adalora: bool) -> str:
        return f"{path}.lora_{factor}" if factor == "E" else f"{path}.{cls.file_prefix}{factor}"

    def add_adapter_output(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        """``output`` (..., d_out) plus the adapter's output for the indices ``x`` (...)."""
        A, B = self.factors(name)
        rows = F.embedding(x, A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)  # type: ignore
        return (output + F.linear(rows * self.scaling[name], B)).to(output.dtype)

    def shape_like_weight(self, delta: Tensor) -> Tensor:
        return delta.T

    @classmethod
    def reset_factors(cls, A: Tensor, B: Tensor, gaussian: bool) -> None:
        """An embedding starts with A = 0 and B normal, because its A is looked up, not multiplied."""
        nn.init.zeros_(A)
        nn.init.normal_(B)
