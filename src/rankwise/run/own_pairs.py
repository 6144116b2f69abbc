"""The factors of rankwise's own layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters import AdapterLayer
from rankwise.run.pairs import FactorPair


class OwnPair(FactorPair):
    """A and B of one of rankwise's adapted layers, and E in the paper's form.

    Args:
        path: the layer's path in the model.
        layer: the layer.
        adapter: the adapter's name.
    """

    def __init__(self, path: str, layer: AdapterLayer, adapter: str) -> None:
        super().__init__(path)
        self.layer, self.adapter = layer, adapter
        self.blocks = layer.blocks(layer)
        self.starts_at_zero = layer.starts_at_zero.removeprefix("lora_")

    def parameter(self, key: str) -> nn.Parameter:
        parameter: nn.Parameter = self.layer.factor(f"lora_{key}", self.adapter)
        return parameter

    @property
    def scale(self) -> float:
        return self.layer.scaling[self.adapter]

    @scale.setter
    def scale(self, value: float) -> None:
        if value != self.scale:
            self.layer.scaling[self.adapter] = value
            with torch.inference_mode(False):
                self.layer.changed_scale[self.adapter] = torch.tensor(
                    value, dtype=torch.float32, device="cpu"
                )

    def base_weight(self) -> Tensor | None:
        return self.layer._parameters.get("weight")

    def narrow(self, kept: Tensor) -> None:
        """Use only the ``kept`` ranks in the forward pass. A layer that keeps none acts as its base layer."""
        rank = int(kept.sum())
        if rank == len(kept):
            self.widen()
        elif self.blocks == 1 and kept[:rank].all():
            self.layer.kept[self.adapter] = rank
        else:
            self.layer.kept[self.adapter] = kept.nonzero().flatten().to(self.parameter("A").device)

    def acting(self) -> Tensor:
        """The ranks that the forward pass uses, (ranks,), bool, on the CPU."""
        kept = self.layer.kept_ranks_of_stack(self.adapter)
        return torch.ones(len(self.parameter("A")), dtype=torch.bool, device="cpu") if kept is None else kept

    def widen(self) -> None:
        """Use all ranks in the forward pass again."""
        self.layer.kept.pop(self.adapter, None)


def own_pairs(layers: Mapping[str, Any], adapter: str) -> list[OwnPair]:
    """The pairs of an adapter on rankwise's layers, in the order of ``layers``."""
    return [OwnPair(path, layer, adapter) for path, layer in layers.items()]
