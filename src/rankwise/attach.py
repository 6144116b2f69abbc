"""Puts adapters into a model, and takes them out: everything is checked and made first, then it all goes in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters import AdapterLayer, adapters_for, prepare_layer, restore_layer
from rankwise.adapters.saved import SavedModule, prepare_saved_module, restore_saved_module
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.targets import find_targets, modules_to_save_paths, pattern_value

PEFT_EPSILON = 1e-5  # PEFT's AdaLoRA scale is lora_alpha / (init_r + 1e-5)
ADALORA_STD = 0.02  # of the start of A and B


@dataclass
class Factors:
    """One layer's share of an adapter: A (r, d_in), B (d_out, r), for AdaLoRA E (r, 1), and its scale."""

    A: Tensor
    B: Tensor
    E: Tensor | None
    scaling: float


@dataclass
class Attachment:
    """An adapter that is made and checked, but not yet in the model."""

    adapter: str
    config: LoraConfig
    layers: dict[str, Factors]
    saved_modules: dict[str, Mapping[str, Tensor] | None] = field(default_factory=dict)
    biases: dict[str, Tensor | None] = field(default_factory=dict)


def adapter_layers(model: nn.Module, adapter: str | None = None) -> dict[str, AdapterLayer]:
    """Module path -> adapted layer, in model order; only those that hold ``adapter``, if given."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, AdapterLayer) and (adapter is None or adapter in module.lora_A)
    }


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """Module path -> module with copies that train beside the adapters."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SavedModule)}


def base_scaling(config: LoraConfig, path: str, rank: int) -> float:
    """The factor before B diag(E) A, as PEFT has it: see `LoraConfig` and `AdaLoraConfig`."""
    if isinstance(config, AdaLoraConfig):
        return config.lora_alpha / (config.init_r + PEFT_EPSILON)
    alpha = pattern_value(config.alpha_pattern or {}, path, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def plan_attachment(model: nn.Module, config: LoraConfig, adapter: str) -> Attachment:
    """Find what ``config`` adapts in ``model`` and make the adapter's start; the model stays as it is.

    Raises:
        ValueError: the name is unusable, nothing or something that can't be adapted matches, a rank is unfit.
    """
    check_adapter_name(model, adapter)
    targets = find_targets(model, config)
    heads = modules_to_save_paths(model, config)
    layers = {path: _start(layer, config, path) for path, layer in targets.items()}
    resolved = _resolved(model, config, targets, heads)
    biases = dict.fromkeys(bias_names(model, config.bias, list(targets), heads))
    return Attachment(adapter, resolved, layers, dict.fromkeys(heads), biases)


def check_adapter_name(model: nn.Module, adapter: str) -> None:
    """Refuse names that can't be module names or are taken."""
    if not isinstance(adapter, str):
        raise TypeError(f"An adapter's name must be a string, but is {adapter!r}.")
    if not adapter or "." in adapter or hasattr(nn.ModuleDict, adapter) or hasattr(nn.ParameterDict, adapter):
        raise ValueError(f"{adapter!r} can't name an adapter: use letters, digits and '_', without dots.")
    if adapter in getattr(model, "peft_config", {}):
        raise ValueError(
            f"The model has an adapter {adapter!r} already. Choose another name, or `delete_adapter` it first."
        )


def apply_attachment(model: nn.Module, attachment: Attachment) -> None:
    """Put the adapter into the model; if that fails half-way, take it out again. Everything else is frozen."""
    trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        _insert(model, attachment)
    except BaseException:
        detach(model, attachment.adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable_before[name])
        raise


def _insert(model: nn.Module, attachment: Attachment) -> None:
    name, config = attachment.adapter, attachment.config
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, factors in attachment.layers.items():
        layer = prepare_layer(model.get_submodule(path))
        layer.add_adapter(name, factors.A, factors.B, factors.E, factors.scaling, config.lora_dropout)
    for path, tensors in attachment.saved_modules.items():
        module = prepare_saved_module(model.get_submodule(path))
        module.add_copy(name)
        if tensors is not None:
            copy = module.modules_to_save[name]
            copy.load_state_dict({key: tensor.to(_dtype_of(copy, key)) for key, tensor in tensors.items()})
    with torch.no_grad():
        for path, value in attachment.biases.items():
            if value is not None:
                model.get_parameter(path).copy_(value)


def detach(model: nn.Module, adapter: str) -> None:
    """Take one adapter out; layers that hold no other get their class back."""
    for layer in adapter_layers(model).values():
        if adapter in layer.lora_A:
            layer.remove_adapter(adapter)
        if not layer.lora_A:
            restore_layer(layer)
    for module in saved_modules(model).values():
        if adapter in module.modules_to_save:
            del module.modules_to_save[adapter]
        if not module.modules_to_save:
            restore_saved_module(module)


def detach_all(model: nn.Module, keep_saved: str | None) -> None:
    """Give all layers their class back; saved modules take the weights of adapter ``keep_saved``."""
    for layer in adapter_layers(model).values():
        restore_layer(layer)
    for module in saved_modules(model).values():
        restore_saved_module(module, keep_saved)


def bias_names(model: nn.Module, bias: str, targets: list[str], heads: list[str]) -> Iterator[str]:
    """Parameter names of the biases that ``bias`` ("none", "all", "lora_only") trains."""
    if bias == "none":
        return
    inside = tuple(f"{path}." for path in heads)
    for name, _ in model.named_parameters():
        module, _, last = name.rpartition(".")
        if (
            last == "bias"
            and not (inside and name.startswith(inside))
            and (bias == "all" or module in targets)
        ):
            yield name


def train_biases(model: nn.Module, config: LoraConfig, adapter: str) -> None:
    """Let the biases train that ``config.bias`` asks for."""
    targets = list(adapter_layers(model, adapter))
    for name in bias_names(model, config.bias, targets, list(saved_modules(model))):
        model.get_parameter(name).requires_grad_(True)


def _start(layer: nn.Module, config: LoraConfig, path: str) -> Factors:
    mixin = adapters_for(layer)
    if mixin is None:
        raise ValueError(f"{path!r} is a {type(layer).__name__}, which can't be adapted.")
    adalora = isinstance(config, AdaLoraConfig)
    rank = config.init_r if adalora else pattern_value(config.rank_pattern or {}, path, config.r)  # type: ignore
    d_in, d_out = mixin.adapter_widths(layer, lora_groups=not adalora)  # type: ignore[arg-type]
    columns = mixin.adapter_columns_of_B(layer, rank, lora_groups=not adalora)  # type: ignore[arg-type]
    options = factor_options(layer)
    A, B = torch.empty(rank, d_in, **options), torch.empty(d_out, columns, **options)
    scaling = base_scaling(config, path, rank)
    if not adalora:
        gaussian = config.init_lora_weights == "gaussian"
        mixin.reset_factors(layer, A, B, gaussian)  # type: ignore[arg-type]
        if config.init_lora_weights is False:
            nn.init.normal_(A, std=1 / rank)
            nn.init.normal_(B, std=1 / rank)
        return Factors(A, B, None, scaling)
    deviation = ADALORA_STD if config.init_lora_weights else 1.0
    E = torch.zeros(rank, 1, **options) if config.init_lora_weights else torch.randn(rank, 1, **options)
    return Factors(A.normal_(std=deviation), B.normal_(std=deviation), E, scaling)


def factor_options(layer: nn.Module) -> dict[str, Any]:
    """Device and dtype for an adapter: the base layer's, but at least float32."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    wide = weight.is_floating_point() and weight.element_size() >= 4
    return {"device": weight.device, "dtype": weight.dtype if wide else torch.float32}


def _resolved(
    model: nn.Module, config: LoraConfig, targets: Mapping[str, nn.Module], heads: list[str]
) -> LoraConfig:
    """The configuration with what was found spelled out, so that it means the same wherever it is read."""
    changes: dict[str, Any] = {}
    if config.target_modules is None or config.target_modules == "all-linear":
        changes["target_modules"] = _names_for(model, list(targets), heads)
        changes["exclude_modules"] = None
    if heads:
        changes["modules_to_save"] = heads
    if not config.base_model_name_or_path:
        changes["base_model_name_or_path"] = (
            getattr(getattr(model, "config", None), "_name_or_path", None) or None
        )
    if any(type(layer).__name__ == "Conv1D" for layer in targets.values()):
        changes["fan_in_fan_out"] = True
    return replace(config, **changes)


def _names_for(model: nn.Module, paths: list[str], heads: list[str]) -> list[str]:
    """Short names that match exactly ``paths``, or the paths themselves where short names match more."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    inside = tuple(f"{head}." for head in heads)
    matched = [
        path
        for path, _ in model.named_modules()
        if path.rpartition(".")[2] in short and path not in heads and not (inside and path.startswith(inside))
    ]
    return short if matched == paths else paths


def _dtype_of(module: nn.Module, key: str) -> torch.dtype:
    dtype: torch.dtype = module.state_dict()[key].dtype
    return dtype
