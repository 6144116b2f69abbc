"""Narrowing PEFT's layers, and their state in optimizers, to the ranks that are left."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.adapt.peft_config import is_embedding_of_words
from rankwise.adapt.peft_pairs import PeftPair, adapters_of, same_ranks
from rankwise.attach.embeddings import resized_vocabulary
from rankwise.parallel.optimizer_state import (
    KINDS,
    can_be_rewritten,
    forget_all_together,
    start_anew,
)
from rankwise.parallel.sharded import is_sharded, put_back
from rankwise.parallel.zero import partitioned
from rankwise.run.pairs import KEYS


def can_be_narrowed(pairs: Iterable[PeftPair]) -> bool:
    """Whether this process holds all factors whole, so that they can be narrowed."""
    put_back()
    return not any(is_sharded(p) or partitioned(p) for pair in pairs for p in map(pair.parameter, KEYS))


@torch.no_grad()
def narrow(
    model: nn.Module, pairs: Sequence[PeftPair], kept: Sequence[Tensor], optimizers: Sequence[Optimizer]
) -> tuple[list[PeftPair], list[PeftPair]]:
    """Remove the ranks of PEFT's layers that are off. A layer without any rank becomes its base layer again.

    The update of every layer stays the same. In a stack of experts all blocks keep the same number of ranks, that of
    the block with the most.

    Args:
        model: model that holds the layers.
        pairs: factors of each layer.
        kept: for each layer, True for a rank that is on, (ranks,), bool, block by block.
        optimizers: optimizers that may train the factors.

    Returns:
        The layers that still hold the adapter, and the layers that do not.
    """
    ranks = [int(own.view(pair.blocks, -1).sum(1).max()) for pair, own in zip(pairs, kept, strict=True)]
    if not any(ranks):  # PEFT has no adapter without layers, so the first layer keeps a rank that is 0
        ranks[0] = 1
    for inner, outer in same_ranks(list(pairs)).items():
        ranks[inner] = ranks[outer] = max(ranks[inner], ranks[outer])
    for n, pair in enumerate(pairs):
        if not ranks[n] and _acts_without_ranks(model, pair):
            ranks[n] = 1
    for optimizer in optimizers:
        forget_all_together(optimizer)
    stay, dropped = [], []
    for pair, own, rank in zip(pairs, kept, ranks, strict=True):
        if rank:
            _narrow_layer(pair, own, rank, optimizers)
            stay.append(pair)
        else:
            dropped.append(pair)
    # Inner layers come first, because parameters of one module nest.
    for pair in sorted(dropped, key=lambda each: each.name.count("."), reverse=True):
        _drop_layer(model, pair, optimizers)
    return stay, dropped


def _acts_without_ranks(model: Any, pair: PeftPair) -> bool:
    """Whether PEFT saves more of an adapted layer than A and B: DoRA's magnitudes, its bias, or resized embeddings.

    With ``bias="all"`` PEFT also saves biases of plain layers. But a layer that holds another adapter does not become a
    plain layer again, and its bias is then saved under the name that it has in an adapted layer.
    """
    layer = pair.layer
    if pair.adapter in layer.lora_variant:
        return True
    if is_embedding_of_words(pair.path) and resized_vocabulary(model) is not None:
        return True
    bias = model.peft_config[pair.adapter].bias
    saves_bias = bias == "lora_only" or (bias == "all" and len(adapters_of(layer)) > 1)
    return saves_bias and getattr(layer.get_base_layer(), "bias", None) is not None


def _narrow_layer(pair: PeftPair, kept: Tensor, rank: int, optimizers: Sequence[Optimizer]) -> None:
    front = (~kept.view(pair.blocks, -1)).to(torch.int8).argsort(dim=1, stable=True)[:, :rank]
    size = kept.numel() // pair.blocks
    chosen = (front + torch.arange(pair.blocks, device="cpu")[:, None] * size).flatten()

    def narrowed(key: str, values: Tensor, shape: torch.Size) -> Tensor:
        rows = pair.rows(key, values)[chosen.to(values.device)]
        return pair.from_rows(key, rows, shape).contiguous()

    scale = pair.scale
    for key in KEYS:
        parameter = pair.parameter(key)
        shape = parameter.shape
        for optimizer in optimizers:
            state: dict[str, Any] = optimizer.state.get(parameter, {})
            if not can_be_rewritten(state, parameter):
                optimizer.state.pop(parameter)
                state = {}
            for name, value in state.items():
                if name in KINDS and isinstance(value, Tensor) and value.shape == shape:
                    state[name] = narrowed(key, value, shape)
        gradient = None if parameter.grad is None else narrowed(key, parameter.grad, shape)
        parameter.grad = None
        _replace_data(parameter, narrowed(key, parameter.data, shape))
        parameter.grad = gradient
        for optimizer in optimizers:
            if parameter not in optimizer.state and _steps(optimizer, parameter):
                start_anew(optimizer, parameter)
        _say_shape(pair, key)
    pair.layer.r[pair.adapter] = rank
    pair.scale = scale


def _replace_data(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values of another shape, even if a graph with the old shape still exists.

    A script's variable ``loss`` keeps the graph of its last step. The node in it that accumulates the gradient knows
    the old shape, and PyTorch would use it again. PyTorch makes a new node if the dtype changes.
    """
    parameter.data = values.new_empty(0, dtype=torch.half if values.dtype != torch.half else torch.float)
    parameter.data = values


def _say_shape(pair: PeftPair, key: str) -> None:
    """Give the module that holds a factor the factor's new sizes."""
    if pair.is_embedding:
        return
    module, shape = pair.module(key), pair.parameter(key).shape
    names = ("out_features", "out_channels") if key == "A" else ("in_features", "in_channels")
    for name in names:
        if hasattr(module, name):
            setattr(module, name, shape[0] if key == "A" else shape[1])


def _drop_layer(model: nn.Module, pair: PeftPair, optimizers: Sequence[Optimizer]) -> None:
    for key in KEYS:
        parameter = pair.parameter(key)
        parameter.grad = None
        parameter.requires_grad_(False)
        for optimizer in optimizers:
            optimizer.state.pop(parameter, None)
    layer: Any = pair.layer
    active, trains = layer._active_adapter, {p: p.requires_grad for p in layer.parameters()}
    # PEFT warns that it lets another adapter act in this layer. It does not: the active adapter is restored below.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.delete_adapter(pair.adapter)
    layer._active_adapter = active
    for parameter in layer.parameters():
        parameter.requires_grad_(trains[parameter])
    if not adapters_of(layer):
        parent, _, last = pair.name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base_layer)


def _steps(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    return any(each is parameter for group in optimizer.param_groups for each in group["params"])
