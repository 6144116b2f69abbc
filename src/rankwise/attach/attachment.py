"""Puts adapters into a model, and takes them out: everything is checked and made first, then it all goes in."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankwise.adapters import AdapterLayer, ParameterSlot, adapters_for, prepare_layer, restore_layer
from rankwise.adapters.owner import SLOTS
from rankwise.adapters.saved import SavedModule, prepare_saved_module, restore_saved_module
from rankwise.attach.matching import names_of_exactly, pattern_value
from rankwise.attach.new_heads import tell_of_new_heads
from rankwise.attach.parameters import in_model_order, layer_at
from rankwise.attach.targets import find_targets, modules_to_save_paths, own_modules
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.method.scale import adalora_scale, lora_scale
from rankwise.parallel.wrappers import WRAPPERS, without

_Prepared = TypeVar("_Prepared")

_RANK_THAT_NEVER_HURTS = 1024  # useless in a layer with smaller widths, but no reason to stop


@dataclass
class Factors:
    """One layer's share of an adapter: A (r, d_in), B (d_out, r), in the paper's form E (r, 1), and its scale.

    Of the triplets of a stack of matrices, which has as many for each, only those ``kept``, (r,), bool, may count.
    """

    A: Tensor
    B: Tensor
    E: Tensor | None
    scaling: float
    kept: Tensor | None = None


@dataclass
class Attachment:
    """An adapter that is made and checked, but not yet in the model.

    ``biases`` are parameters of the base that train with the adapter, or that its file replaces; ``frozen`` are those
    that a run's file replaces and that don't train in it.
    """

    adapter: str
    config: LoraConfig
    layers: dict[str, Factors]
    saved_modules: dict[str, Mapping[str, Tensor] | None] = field(default_factory=dict)
    biases: dict[str, Tensor | None] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    widens: bool = True  # copies of whole modules are float32 where the module has half precision


def adapter_layers(model: nn.Module, adapter: str | None = None) -> dict[str, AdapterLayer]:
    """Module path -> adapted layer, in model order; only those that hold ``adapter``, if given."""
    return {
        plain_name(path): module
        for path, module in model.named_modules()
        if isinstance(module, AdapterLayer) and (adapter is None or adapter in module.lora_A)
    }


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """Module path -> module with copies that train beside the adapters."""
    return {
        plain_name(path): module for path, module in model.named_modules() if isinstance(module, SavedModule)
    }


def plain_name(name: str) -> str:
    """The name of a module or parameter without what ``torch.compile`` and ``checkpoint_wrapper`` put into it.

    An adapted parameter's factors are found under the parameter's own name.
    """
    return without(name, (*WRAPPERS, SLOTS))


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dictionary with `plain_name` for every key."""
    return {plain_name(key): value for key, value in state.items()}


def base_scaling(config: LoraConfig, path: str, rank: int) -> float:
    """The factor before B A or B diag(E) A at the start: see `LoraConfig` and `AdaLoraConfig`."""
    if isinstance(config, AdaLoraConfig):
        if config.form.has_E:
            return adalora_scale(config.lora_alpha, config.init_r)
        return lora_scale(config.lora_alpha, config.init_r, config.use_rslora)
    alpha = pattern_value(config.alpha_pattern or {}, path, config.lora_alpha)
    return lora_scale(alpha, rank, config.use_rslora)


def plan_attachment(model: nn.Module, config: LoraConfig, adapter: str) -> Attachment:
    """Find what ``config`` adapts in ``model`` and make the adapter's start; the model stays as it is.

    Raises:
        ValueError: the name is unusable, nothing or something that can't be adapted matches, a rank is unfit.
    """
    check_adapter_name(model, adapter)
    if isinstance(config, AdaLoraConfig) and config.rank_pattern is not None:
        warnings.warn(
            f"`rank_pattern` is the result of another run and has no effect on adapter {adapter!r}, which is new: all "
            f"of its layers start at rank {config.init_r}. To go on with those ranks, load that run's folder with "
            "`PeftModel.from_pretrained(model, folder, is_trainable=True)`; else leave it out.",
            UserWarning,
            stacklevel=3,
        )
        config = replace(config, rank_pattern=None)
    targets = find_targets(model, config)
    heads = modules_to_save_paths(model, config)
    tell_of_new_heads(model, own_modules(model), config, heads, targets)
    layers = {path: _start(layer, config, path) for path, layer in targets.items()}
    resolved = _resolved(model, config, targets, heads)
    biases = dict.fromkeys(bias_names(model, config.bias, list(targets), heads))
    return Attachment(adapter, resolved, layers, dict.fromkeys(heads), biases)


def check_adapter_name(model: nn.Module, adapter: str) -> None:
    """Refuse names that can't be module names or are taken."""
    if not isinstance(adapter, str):
        raise TypeError(f"An adapter's name must be a string, but is {adapter!r}.")
    if not adapter or "." in adapter:
        raise ValueError(f"{adapter!r} can't name an adapter: use letters, digits and '_', without dots.")
    if hasattr(nn.ModuleDict(), adapter) or hasattr(nn.ParameterDict(), adapter):
        raise ValueError(
            f"{adapter!r} can't name an adapter: every module of PyTorch has an attribute of that name. Choose "
            "another, "
            f"such as {adapter + '_adapter'!r}."
        )
    if adapter in getattr(model, "peft_config", {}):
        raise ValueError(
            f"The model has an adapter {adapter!r} already. To attach anew, as when a notebook's cell is run "
            "again, call "
            "`model = model.unload()` first, which gives the base model back. To add a second adapter, choose another "
            "name; to replace this one beside others, `delete_adapter` it first."
        )


def refuse_overlap(model: nn.Module, attachment: Attachment) -> None:
    """Refuse an adapter if it adapts a module that trains whole in another one, or the other way round.

    What lies in a module that trains whole does so, too.

    Raises:
        ValueError: there is such a module.
    """
    layers, saved = list(adapter_layers(model)), list(saved_modules(model))
    pairs = [(path, other) for path in attachment.layers for other in saved if _lies_in(path, other)]
    for path in attachment.saved_modules:
        pairs += [(path, other) for other in layers if _lies_in(other, path)]
        pairs += [(path, s) for s in saved if s != path and (_lies_in(s, path) or _lies_in(path, s))]
    for path, other in pairs:
        names = f"{path!r}" if path == other else f"{path!r} and {other!r}, of which one holds the other,"
        raise ValueError(
            f"{names} would be adapted by one adapter and train whole in another. Let adapter "
            f"{attachment.adapter!r} treat it as the others do, in `modules_to_save` or `exclude_modules`."
        )


def _lies_in(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def apply_attachment(model: nn.Module, attachment: Attachment) -> None:
    """Put the adapter into the model; it neither acts nor trains yet. Should it fail half-way, `detach` it.

    The first adapter freezes all of the model; another one leaves what trains as it is.
    """
    name, config = attachment.adapter, attachment.config
    if not adapter_layers(model) and not saved_modules(model):
        model.requires_grad_(False)
    for path, factors in attachment.layers.items():
        layer = _named(path, prepare_layer, layer_at(model, path))
        layer.add_adapter(name, factors.A, factors.B, factors.E, factors.scaling, config.lora_dropout)
        if factors.kept is not None:
            layer.kept[name] = factors.kept.nonzero().flatten().to(factors.A.device)
    for path, tensors in attachment.saved_modules.items():
        module = _named(path, prepare_saved_module, model.get_submodule(path))
        module.add_copy(name, attachment.widens)
        if tensors is not None:
            copy = module.modules_to_save[name]
            copy.load_state_dict({key: tensor.to(_dtype_of(copy, key)) for key, tensor in tensors.items()})
    with torch.no_grad():
        for path, value in [*attachment.biases.items(), *attachment.frozen.items()]:
            if value is not None:
                model.get_parameter(path).copy_(value)


def _named(path: str, prepare: Callable[[nn.Module], _Prepared], module: nn.Module) -> _Prepared:
    """What ``prepare`` makes of the module; its errors name the path."""
    try:
        return prepare(module)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


def follow(model: nn.Module, adapter: str, active: list[str], enabled: bool) -> None:
    """Give the places where ``adapter`` is the model's present state: which adapters act, and whether any may."""
    for layer in adapter_layers(model, adapter).values():
        layer.active_adapters, layer.adapters_enabled = list(active), enabled
    for module in saved_modules(model).values():
        if adapter in module.modules_to_save:
            module.adapters_enabled = enabled


def check_compute_dtype(dtype: Any) -> None:
    """See that ``dtype`` is one that an adapter can compute in, or None.

    Raises:
        TypeError: it isn't.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"`adapter_compute_dtype` must be a floating-point dtype, such as torch.float32, or None, but is {dtype!r}."
        )


def set_compute_dtype(model: nn.Module, adapter: str, dtype: torch.dtype | None) -> None:
    """Let an adapter compute in ``dtype``, or with None in those of each layer's input and output."""
    for layer in adapter_layers(model, adapter).values():
        layer.adapter_compute_dtype.pop(adapter, None)
        if dtype is not None:
            layer.adapter_compute_dtype[adapter] = dtype


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


def detach_all(model: nn.Module, keep_saved: Sequence[str] = ()) -> None:
    """Give all layers their class back; saved modules take the weights of the first of ``keep_saved`` they know."""
    for layer in adapter_layers(model).values():
        restore_layer(layer)
    for module in saved_modules(model).values():
        restore_saved_module(
            module, next((name for name in keep_saved if name in module.modules_to_save), None)
        )


def bias_names(model: nn.Module, bias: str, targets: list[str], heads: list[str]) -> Iterator[str]:
    """Parameter names of the biases that ``bias`` ("none", "all", "lora_only") trains."""
    if bias == "none":
        return
    inside = tuple(f"{path}." for path in heads)
    for name, _ in model.named_parameters():
        module, _, last = plain_name(name).rpartition(".")
        if (
            last == "bias"
            and not (inside and plain_name(name).startswith(inside))
            and (bias == "all" or module in targets)
        ):
            yield name


def train_biases(model: nn.Module, config: LoraConfig, adapter: str, trains: bool) -> None:
    """Let the biases train, or not, that ``config.bias`` asks for."""
    targets = list(adapter_layers(model, adapter))
    for name in bias_names(model, config.bias, targets, list(saved_modules(model))):
        model.get_parameter(name).requires_grad_(trains)


def _start(layer: nn.Module, config: LoraConfig, path: str) -> Factors:
    mixin = adapters_for(layer)
    if mixin is None:
        raise ValueError(f"{path!r} is a {type(layer).__name__}, which can't be adapted.")
    adalora = isinstance(config, AdaLoraConfig)
    rank = config.init_r if adalora else pattern_value(config.rank_pattern or {}, path, config.r)  # type: ignore
    shape_A, shape_B = mixin.factor_shapes(layer, rank, adalora)
    _check_rank(rank, shape_A[1], shape_B[0], path)
    options = factor_options(layer)
    A, B = torch.empty(shape_A, **options), torch.empty(shape_B, **options)
    scaling = base_scaling(config, path, rank)
    if not adalora:
        gaussian = config.init_lora_weights == "gaussian"
        mixin.reset_factors(A, B, gaussian)
        if gaussian and len(A) > rank:  # a stack's, whose deviation is that of one matrix
            A.mul_(len(A) / rank)
        if config.init_lora_weights is False:
            nn.init.normal_(A, std=1 / rank)
            nn.init.normal_(B, std=1 / rank)
        return Factors(A, B, None, scaling)
    form = config.form  # type: ignore[attr-defined]
    E = torch.empty(len(A), 1, **options) if form.has_E else None
    form.start(A, E, B, functools.partial(mixin.reset_factors, gaussian=False))
    return Factors(A, B, E, scaling)


def _check_rank(rank: int, d_in: int, d_out: int, path: str) -> None:
    """Refuse ranks that could only fill the memory: the update's own rank is no more than the smaller width."""
    most = max(min(d_in, d_out), _RANK_THAT_NEVER_HURTS)
    if rank > most:
        raise ValueError(
            f"Rank {rank} is too much for {path!r}, which has {d_in} inputs and {d_out} outputs: set it to at most "
            f"{most}."
        )


def factor_options(layer: nn.Module) -> dict[str, Any]:
    """Device and dtype for an adapter: the base layer's, but at least float32."""
    held = (getattr(layer, name, None) for name in ("weight", "qweight"))
    weight = next(each for each in held if isinstance(each, Tensor))
    wide = weight.is_floating_point() and weight.element_size() >= 4
    device = _execution_device(layer) if weight.is_meta else weight.device
    return {"device": device, "dtype": weight.dtype if wide else torch.float32}


def _execution_device(layer: nn.Module) -> Any:
    """Where a layer computes whose weight Accelerate brings in for each forward pass."""
    layer = layer.owner if isinstance(layer, ParameterSlot) else layer
    hook = vars(layer).get("_hf_hook")
    hooks = [hook, *getattr(hook, "hooks", ())]
    devices = (getattr(each, "execution_device", None) for each in hooks)
    return next((device for device in devices if device is not None), "meta")


def _resolved(
    model: nn.Module, config: LoraConfig, targets: Mapping[str, nn.Module], heads: list[str]
) -> LoraConfig:
    """The configuration with what was found spelled out, so that it means the same wherever it is read."""
    changes: dict[str, Any] = {}
    slots = [path for path, layer in targets.items() if isinstance(layer, ParameterSlot)]
    if config.target_modules is None or config.target_modules == "all-linear":
        layers = [path for path in targets if path not in slots]
        changes["target_modules"] = names_for(model, layers, heads)
        changes["exclude_modules"] = None
    if config.target_parameters:
        changes["target_parameters"] = in_model_order(config.target_parameters, slots)
    if heads:
        changes["modules_to_save"] = heads
    if not config.base_model_name_or_path:
        changes["base_model_name_or_path"] = (
            getattr(getattr(model, "config", None), "_name_or_path", None) or None
        )
    if any(type(layer).__name__ == "Conv1D" for layer in targets.values()):
        changes["fan_in_fan_out"] = True
    return replace(config, **changes)


def names_for(model: nn.Module, paths: list[str], heads: list[str]) -> list[str] | str:
    """Short names that match exactly ``paths``, or the paths themselves where short names match more."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    inside = tuple(f"{head}." for head in heads)
    others = [
        path
        for path, _ in model.named_modules()
        if path not in heads and not (inside and path.startswith(inside))
    ]
    matched = [path for path in others if path.rpartition(".")[2] in short]
    return short if matched == paths else names_of_exactly(paths, others)


def _dtype_of(module: nn.Module, key: str) -> torch.dtype:
    dtype: torch.dtype = module.state_dict()[key].dtype
    return dtype
