"""Adapters for ``nn.Embedding``, also for those that multiply their output by an ``embed_scale``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
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
        scaling = self.scaling[name] * scale_of_embedding(self)
        return (output + F.linear((rows * scaling).to(rows.dtype), B)).to(output.dtype)

    @torch.no_grad()
    def check_merge(self, names: list[str], finite: bool = False) -> None:
        if self.max_norm is not None and self._not_yet_merged(names):
            raise ValueError(
                f"This embedding has max_norm={self.max_norm}, which would shorten the merged rows, so nothing can be "
                "merged into it. Keep the adapter unmerged."
            )
        super().check_merge(names, finite)

    def shape_like_weight(self, delta: Tensor) -> Tensor:
        return delta.T

    @classmethod
    def reset_factors(cls, A: Tensor, B: Tensor, gaussian: bool) -> None:
        """An embedding starts with A = 0 and B normal, because its A is looked up, not multiplied."""
        nn.init.zeros_(A)
        nn.init.normal_(B)


def scale_of_embedding(layer: Any) -> Any:
    """The number by which an embedding multiplies its rows: a float, or a tensor of one number.

    Embeddings of Gemma, M2M100, mBART and others have it, and PEFT reads it from the same attribute.
    """
    cls = getattr(layer, "_original_class", type(layer))
    return 1.0 if cls.forward is nn.Embedding.forward else getattr(layer, "embed_scale", 1.0)
