"""The factors of PEFT's own LoRA layers. Of each layer only A, B and ``scaling`` are read and written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.parallel.wrappers import without
from rankwise.run.pairs import FactorPair, FactorsGone


class PeftPair(FactorPair):
    """The factors A and B of one adapter in one of PEFT's LoRA layers.

    Args:
        path: path of the layer in the base model, as in PEFT's configuration.
        name: path of the layer in the model that the user passed.
        layer: PEFT's ``LoraLayer``.
        adapter: name of the adapter.
    """

    def __init__(self, path: str, name: str, layer: Any, adapter: str) -> None:
        super().__init__(path)
        self.name, self.layer, self.adapter = name, layer, adapter
        self.is_parameter = type(layer).__name__ == "ParamWrapper"
        self.blocks = int(layer.num_experts) if self.is_parameter else 1
        self.is_embedding = adapter in layer.lora_embedding_A
        self.starts_at_zero = "A" if self.is_embedding else "B"
        # An adapter that was deleted and added again has other modules.
        self._modules = () if self.is_embedding else (self.module("A"), self.module("B"))

    def module(self, key: str) -> Any:
        """The module that holds a factor. In embeddings a factor is a parameter of its own, without a module."""
        return (self.layer.lora_A if key == "A" else self.layer.lora_B)[self.adapter]

    def parameter(self, key: str) -> nn.Parameter:
        # This runs at every step for every layer, and takes a fraction of the time of attribute access.
        held: Any = self.layer._modules[("lora_embedding_" if self.is_embedding else "lora_") + key]
        try:
            if self.is_embedding:
                return held._parameters[self.adapter]  # type: ignore[no-any-return]
            module = held._modules[self.adapter]
            if module is not self._modules[key == "B"]:
                raise KeyError(self.adapter)
            return module._parameters["weight"]  # type: ignore[no-any-return]
        except KeyError:
            raise FactorsGone(f"{self.path!r} has no adapter {self.adapter!r} any more.") from None

    @property
    def name_of_A(self) -> str:
        """The name of A in the state dictionary of the model that the user passed."""
        inner = f"lora_embedding_A.{self.adapter}" if self.is_embedding else f"lora_A.{self.adapter}.weight"
        return f"{self.name}.{inner}".removeprefix(".")

    @property
    def scale(self) -> float:
        return float(self.layer.scaling[self.adapter])

    @scale.setter
    def scale(self, value: float) -> None:
        self.layer.scaling[self.adapter] = value
        self.layer.lora_alpha[self.adapter] = self.alpha

    def check_writable(self) -> None:
        if self.adapter in self.layer.merged_adapters:
            raise ValueError(
                f"The adapter {self.adapter!r} is merged into {self.path!r}, so its ranks can't be cut: call "
                "`unmerge_adapter` first."
            )

    @property
    def rank(self) -> int:
        """Rank of each block, as in PEFT's configuration."""
        return int(self.layer.r[self.adapter])

    @property
    def alpha(self) -> float:
        """The value of PEFT's ``lora_alpha`` that gives the current scale at the current rank."""
        by = math.sqrt(self.rank) if self.layer.use_rslora[self.adapter] else self.rank
        return self.scale * by

    def order(self, key: str, ranks: int) -> Tensor | None:
        """The order that sorts the ranks by block. In a stack of experts B is laid out by rank, then by expert."""
        if key != "B" or self.blocks == 1:
            return None
        return torch.arange(ranks, device="cpu").view(-1, self.blocks).T.flatten()

    def base_weight(self) -> Tensor | None:
        weight = getattr(self.layer.get_base_layer(), "weight", None)
        return weight if isinstance(weight, Tensor) else None


def lora_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, Any]]:
    """Names and layers of PEFT's LoRA in ``model``. With ``adapter``, only the layers that hold it."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (adapter is None or adapter in adapters_of(module)):
            yield name, module


def adapters_of(layer: Any) -> set[str]:
    """The names of the adapters that have factors in one of PEFT's LoRA layers."""
    return {*layer.lora_A, *layer.lora_embedding_A}


def peft_pairs(model: nn.Module, adapter: str) -> list[PeftPair]:
    """The factors of ``adapter`` on PEFT's layers in ``model``, in the model's order."""
    prefix = base_prefix(model)
    return [
        PeftPair(_path(name.removeprefix(prefix), layer), name, layer, adapter)
        for name, layer in lora_layers(model, adapter)
    ]


def lora_model(model: Any) -> nn.Module | None:
    """The model that holds PEFT's configurations: ``model`` itself, or the first in it; None if there is none."""
    if not isinstance(model, nn.Module):
        return None
    for module in model.modules():
        if "_orig_mod" in module._modules:  # a compiled model passes attribute lookups on
            continue
        if getattr(module, "peft_config", None) and next(lora_layers(module), None) is not None:
            return module
    return None


def other_paths(model: nn.Module, pairs: Iterable[PeftPair]) -> list[str]:
    """The paths of all modules of the base model that are not those of ``pairs`` or inside them."""
    prefix, own, found = base_prefix(model), {pair.name for pair in pairs}, []
    for name, _ in model.named_modules():
        if name.rpartition(".")[0] in own:
            own.add(name)
        if name not in own:
            found.append(without(name.removeprefix(prefix)))
    return found


def base_prefix(model: nn.Module) -> str:
    """The prefix that PEFT puts before the names of the base model's modules. Empty if adapters were injected."""
    if type(model).__module__.startswith("peft.tuners.") and hasattr(model, "model"):
        return "model."
    inner = getattr(model, "base_model", None)
    wrapped = type(inner).__module__.startswith("peft.") and hasattr(inner, "model")
    return "base_model.model." if wrapped else ""


def _path(name: str, layer: Any) -> str:
    """A layer's path as in PEFT's configuration."""
    name = without(name)
    if type(layer).__name__ == "ParamWrapper":  # two parameters of one module nest
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        return f"{name}.{layer.parameter_name}"
    return name


def same_ranks(pairs: list[PeftPair]) -> Mapping[int, int]:
    """For each layer that must have the same rank as a layer around it, the number of that outer layer.

    PEFT's multi-head attention contains its output projection, and adapts both with one rank.
    """
    number_of = {id(pair.layer): n for n, pair in enumerate(pairs)}
    inner = {}
    for n, pair in enumerate(pairs):
        if type(pair.layer).__name__ == "MultiheadAttention":
            projection = number_of.get(id(pair.layer.base_layer.out_proj))
            if projection is not None:
                inner[projection] = n
    return inner
