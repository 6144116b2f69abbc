"""Loads an adapter's values from a folder into an adapter on a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters import AdapterLayer, adapters_for
from rankwise.attach.attachment import (
    Attachment,
    Factors,
    adapter_layers,
    base_scaling,
    check_adapter_name,
    plain_name,
    saved_modules,
)
from rankwise.attach.parameters import in_model_order, layer_at
from rankwise.attach.targets import parameter_targets
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.parallel.sharded import laid_out, local, local_like
from rankwise.run.controller import Controller
from rankwise.run.pairs import block_names
from rankwise.storage.adapter_file import AdapterFile, kept_by_pattern, without_E
from rankwise.storage.fit import fit_all, with_all_heads
from rankwise.storage.lora_layout import ranks_and_alphas
from rankwise.storage.names import (
    NO_SCHEDULE,
)


def plan_from_file(model: nn.Module, file: AdapterFile, adapter: str, trainable: bool) -> Attachment:
    """Fit an adapter folder's contents to ``model``, which does not change.

    Raises:
        ValueError: the adapter belongs to another model. The message names the first layer that differs.
    """
    check_adapter_name(model, adapter)
    changes: dict[str, Any] = {"inference_mode": not trainable}
    if trainable and isinstance(file.config, AdaLoraConfig) and file.config.total_step == NO_SCHEDULE:
        changes["total_step"] = None
    config = file.config_with(**changes)
    layers, heads, rest = fit_all(model, file, config)
    if file.of_weight:  # in LoRA's layout, a convolution's rank is multiplied by its number of groups
        sizes = {path: (_rank_of(model, path, factors), factors.scaling) for path, factors in layers.items()}
        config = replace(config, **ranks_and_alphas(sizes))
    for path in file.nested:
        layers[path].kept = _acting_of_stack(layers[path])
    if isinstance(config, AdaLoraConfig) and config.target_parameters:
        stacks = [path for path, kept in kept_by_pattern(config).items() if len(kept) > config.init_r]
        for path in stacks:
            layers[path] = _stacked(layers[path], kept_by_pattern(config)[path], config, trainable)
    if config.target_parameters:
        found = map(plain_name, parameter_targets(model, replace(config, inference_mode=True)))
        config = replace(config, target_parameters=in_model_order(config.target_parameters, found))
    return Attachment(adapter, with_all_heads(config, heads), layers, heads, rest)  # type: ignore[arg-type]


def _stacked(factors: Factors, kept: Sequence[bool], config: LoraConfig, trainable: bool) -> Factors:
    """Expand a stack's factors, of which a file has only the kept triplets, to the same rank for each matrix.

    For training, this is the rank at the start of the run. Otherwise it is the smallest rank that suffices.
    """
    rows = torch.tensor(kept, device="cpu").view(-1, config.init_r)  # type: ignore[attr-defined]
    if not trainable:
        rows = torch.arange(int(rows.sum(1).max()), device="cpu") < rows.sum(1, keepdim=True)
    flat = rows.flatten()
    made = [_spread(value, is_B, flat) for value, is_B in ((factors.A, False), (factors.B, True))]
    E = None if factors.E is None else _spread(factors.E, False, flat)
    return Factors(made[0].contiguous(), made[1].contiguous(), E, factors.scaling, flat)


def prepare_values(
    model: nn.Module,
    adapter: str,
    file: AdapterFile,
    controller: Controller | None,
    takes_choice: bool = True,
) -> Callable[[], None]:
    """Check that an attached adapter can take the values in a file, and prepare to load them.

    Args:
        model: the model that holds the adapter.
        adapter: the adapter's name.
        file: the contents of the file.
        controller: the controller that trains the adapter, if there is one.
        takes_choice: whether the adapter takes over the file's choice of ranks. Otherwise its run continues with its
            own ranks.

    Returns:
        A function that loads the values into the adapter.

    Raises:
        ValueError: the values belong to another adapter.
    """
    layers, heads, rest = fit_all(model, file, file.config)
    own = adapter_layers(model, adapter)
    copies = {path: m for path, m in saved_modules(model).items() if adapter in m.modules_to_save}
    takes_ranks = controller is not None and without_E(controller.config)
    at_rank_0 = _at_rank_0(own, file) - layers.keys() if takes_ranks else set()
    for path in (own.keys() ^ (layers.keys() | at_rank_0)) | (copies.keys() ^ heads.keys()):
        where = "the model" if path in own or path in copies else file.source
        raise ValueError(f"{file.source}: only {where} adapts {path!r}; this is another adapter.")
    made: dict[str, Factors] = {}
    kept: dict[str, Tensor] = {}
    for path in own:
        if takes_ranks:
            made[path], kept[path] = _with_first_ranks(own[path], adapter, path, layers.get(path), file)
        else:
            kept[path] = _places(own[path], adapter, path, layers[path], file)
            made[path] = _spread_factors(layers[path], kept[path])
    all_parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}

    @torch.no_grad()
    def load() -> None:
        for path, factors in made.items():
            parameters = own[path].adapter_parameters(adapter)
            for key, value in (("lora_A", factors.A), ("lora_E", factors.E), ("lora_B", factors.B)):
                if value is not None:
                    local(parameters[key]).copy_(local_like(value, parameters[key]))
            own[path].scaling[adapter] = factors.scaling
            if path in file.nested and controller is None:  # a stack's matrices may be padded with zeros
                own[path].kept.pop(adapter, None)
                if (acting := _acting_of_stack(factors)) is not None:
                    own[path].kept[adapter] = acting.nonzero().flatten().to(own[path].lora_A[adapter].device)
        for path, tensors in heads.items():
            copy = copies[path].modules_to_save[adapter]
            copy.load_state_dict(laid_out(tensors, copy.state_dict()))
        for name, value in rest.items():
            local(all_parameters[name]).copy_(local_like(value, all_parameters[name]))
        if controller is not None and takes_choice:
            controller.take_over(kept, file.history)

    return load


def _at_rank_0(own: Mapping[str, AdapterLayer], file: AdapterFile) -> set[str]:
    """The paths of layers at rank 0 in a plain LoRA folder. They have no tensors, but the history names them."""
    named = set(file.history.layers) if file.history is not None else set()
    return {path for path, layer in own.items() if set(block_names(path, layer.blocks(layer))) <= named}


def _with_first_ranks(
    layer: AdapterLayer, adapter: str, path: str, factors: Factors | None, file: AdapterFile
) -> tuple[Factors, Tensor]:
    """Fill the first ranks of each of a layer's blocks with a file's values, and the others with 0.

    Returns:
        The values; and the ranks that are not 0, (ranks,), bool.
    """
    A, B = (parameter.detach() for parameter in (layer.lora_A[adapter], layer.lora_B[adapter]))
    blocks = layer.blocks(layer)
    kept = torch.zeros(blocks, len(A) // blocks, dtype=torch.bool, device="cpu")
    if factors is None:
        scale = base_scaling(file.config, "", file.config.r)
        return Factors(torch.zeros_like(A), torch.zeros_like(B), None, scale), kept.flatten()
    try:
        own_A, own_B = layer.from_lora(layer, factors.A, factors.B)
    except ValueError as error:
        raise ValueError(f"{file.source}: {path!r}: {error}") from None
    rank = len(own_A) // blocks
    if rank > kept.shape[1]:
        raise ValueError(
            f"{file.source}: {path!r} has rank {rank}, but the attached adapter {kept.shape[1]}."
        )
    kept[:, :rank] = True
    first = kept.flatten()
    values = Factors(_spread(own_A, False, first), _spread(own_B, True, first), None, factors.scaling)
    kept[:, :rank] = _acts(own_A, own_B).view(blocks, -1)
    return values, kept.flatten()


def _acts(A: Tensor, B: Tensor) -> Tensor:
    """The ranks with any value other than 0, (ranks,), bool, on the CPU."""
    return ((A != 0).any(1) | (B != 0).any(0)).cpu()


def _acting_of_stack(factors: Factors) -> Tensor | None:
    """The ranks of a stack that are not padding, (ranks,), bool; None if there is no padding."""
    acts = _acts(factors.A, factors.B)
    return None if acts.all() else acts


def _rank_of(model: nn.Module, path: str, factors: Factors) -> int:
    layer = layer_at(model, path)
    kind = adapters_for(layer)
    return len(factors.A) if kind is None else kind.rank_of(layer, factors.A)


def _spread_factors(factors: Factors, kept: Tensor) -> Factors:
    """The factors with zeros where ``kept`` is False. Factors of plain LoRA do not change."""
    if factors.E is None:
        return factors
    A, B = _spread(factors.A, False, kept), _spread(factors.B, True, kept)
    return Factors(A, B, _spread(factors.E, False, kept), factors.scaling)


def _spread(value: Tensor, is_B: bool, kept: Tensor) -> Tensor:
    """A factor with zero triplets where ``kept`` is False."""
    rows = value.T if is_B else value
    spread = rows.new_zeros(len(kept), rows.shape[1])
    spread[kept] = rows
    return spread.T if is_B else spread


def _places(layer: AdapterLayer, adapter: str, path: str, factors: Factors, file: AdapterFile) -> Tensor:
    """The attached triplets that the file's triplets correspond to, (r,), bool."""
    held, rank = layer.lora_A[adapter].shape[0], factors.A.shape[0]
    alike = (adapter in layer.lora_E) == (factors.E is not None)
    if not alike or not math.isclose(layer.scaling[adapter], factors.scaling, rel_tol=1e-6):
        raise ValueError(
            f"{file.source}: the adapter in the file is of another kind, or scaled in another way (`lora_alpha` and "
            f"rank), than the one that is attached: {path!r} has the scale {factors.scaling:.6g} there, and "
            f"{layer.scaling[adapter]:.6g} here. Attach it with the configuration that it was saved with."
        )
    places = torch.zeros(held, dtype=torch.bool, device="cpu")
    listed = kept_by_pattern(file.config).get(path)
    if listed is not None and rank < held:
        places[: len(listed)] = torch.tensor(listed[:held], dtype=torch.bool, device="cpu")
    else:
        places[:rank] = True
    if rank > held or int(places.sum()) != rank or (factors.E is None and rank < held):
        raise ValueError(f"{file.source}: {path!r} has rank {rank}, but the attached adapter {held}.")
    return places
