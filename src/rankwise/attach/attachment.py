"""Puts adapters into a model and removes them. The whole adapter is checked and made before the model changes."""

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
from rankwise.attach.batch_norm import tell_of_running_averages
from rankwise.attach.matching import names_of_exactly, pattern_value
from rankwise.attach.new_heads import tell_of_new_heads
from rankwise.attach.parameters import in_model_order, layer_at
from rankwise.attach.targets import find_targets, modules_to_save_paths, own_modules
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.method.scale import adalora_scale, lora_scale
from rankwise.parallel.wrappers import WRAPPERS, without

_Prepared = TypeVar("_Prepared")

_RANK_THAT_NEVER_HURTS = 1024  # ranks up to this are allowed even in layers whose widths are smaller


@dataclass
class Factors:
    """One layer's part of an adapter.

    Args:
        A: factor A, (r, d_in).
        B: factor B, (d_out, r).
        E: factor E of the paper's form, (r, 1). None in other forms.
        scaling: scale of the update.
        kept: True for a triplet that may act, (r,), bool. A stack of matrices needs it, because all its matrices have
            equally many triplets. None: all may act.
    """

    A: Tensor
    B: Tensor
    E: Tensor | None
    scaling: float
    kept: Tensor | None = None


@dataclass
class Attachment:
    """An adapter that is made and checked, but not yet in the model.

    Args:
        adapter: name of the adapter.
        config: configuration of the adapter.
        layers: factors of each layer, by path.
        saved_modules: state dictionary of each module that trains in full, by path. None: a copy of the base module.
        biases: new value of each bias of the base that trains with the adapter, by name. None: it keeps its value.
        frozen: new value of each parameter of the base that a run's file replaces but does not train, by name.
        widens: whether copies of half-precision modules that train in full are float32.
    """

    adapter: str
    config: LoraConfig
    layers: dict[str, Factors]
    saved_modules: dict[str, Mapping[str, Tensor] | None] = field(default_factory=dict)
    biases: dict[str, Tensor | None] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    widens: bool = True


def adapter_layers(model: nn.Module, adapter: str | None = None) -> dict[str, AdapterLayer]:
    """The adapted layers by path, in the model's order. With ``adapter``, only the layers that hold it."""
    return {
        plain_name(path): module
        for path, module in model.named_modules()
        if isinstance(module, AdapterLayer) and (adapter is None or adapter in module.lora_A)
    }


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """The modules that train in full with an adapter, by path."""
    return {
        plain_name(path): module for path, module in model.named_modules() if isinstance(module, SavedModule)
    }


def plain_name(name: str) -> str:
    """Remove the parts of a name that ``torch.compile`` and ``checkpoint_wrapper`` insert.

    The factors of an adapted parameter get the parameter's own name.
    """
    return without(name, (*WRAPPERS, SLOTS))


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Apply `plain_name` to every key of a state dictionary."""
    return {plain_name(key): value for key, value in state.items()}


def base_scaling(config: LoraConfig, path: str, rank: int) -> float:
    """The scale of B A or of B diag(E) A at the start: see `LoraConfig` and `AdaLoraConfig`."""
    if isinstance(config, AdaLoraConfig):
        if config.form.has_E:
            return adalora_scale(config.lora_alpha, config.init_r)
        return lora_scale(config.lora_alpha, config.init_r, config.use_rslora)
    alpha = pattern_value(config.alpha_pattern or {}, path, config.lora_alpha)
    return lora_scale(alpha, rank, config.use_rslora)


def plan_attachment(model: nn.Module, config: LoraConfig, adapter: str) -> Attachment:
    """Find the layers that ``config`` adapts, and make the start of the adapter. The model stays as it is.

    Raises:
        ValueError: the name cannot be used, no layer matches ``config``, a matching layer cannot be adapted, or a
            rank is too large.
    """
    check_adapter_name(model, adapter)
    if isinstance(config, AdaLoraConfig) and config.rank_pattern is not None:
        warnings.warn(
            f"`rank_pattern` is the result of another run and has no effect on adapter {adapter!r}, which is new: all "
            f"of its layers start at rank {config.init_r}. To continue with those ranks, load that run's folder with "
            "`PeftModel.from_pretrained(model, folder, is_trainable=True)`. Otherwise, leave it out.",
            UserWarning,
            stacklevel=3,
        )
        config = replace(config, rank_pattern=None)
    targets = find_targets(model, config)
    heads = modules_to_save_paths(model, config)
    tell_of_new_heads(model, own_modules(model), config, heads, targets)
    tell_of_running_averages(own_modules(model), config, heads)
    layers = {path: _start(layer, config, path) for path, layer in targets.items()}
    resolved = _resolved(model, config, targets, heads)
    biases = dict.fromkeys(bias_names(model, config.bias, list(targets), heads))
    return Attachment(adapter, resolved, layers, dict.fromkeys(heads), biases)


def check_adapter_name(model: nn.Module, adapter: str) -> None:
    """Refuse names that cannot be module names or are taken."""
    if not isinstance(adapter, str):
        raise TypeError(f"An adapter's name must be a string, but is {adapter!r}.")
    if not adapter or "." in adapter:
        raise ValueError(f"{adapter!r} can't name an adapter: use letters, digits and '_', without dots.")
    if hasattr(nn.ModuleDict(), adapter) or hasattr(nn.ParameterDict(), adapter):
        raise ValueError(
            f"{adapter!r} can't name an adapter: every module of PyTorch has an attribute of that name. Choose "
            f"another, such as {adapter + '_adapter'!r}."
        )
    if adapter in getattr(model, "peft_config", {}):
        raise ValueError(
            f"The model has an adapter {adapter!r} already. To attach it again, for example when a notebook's cell is "
            "run again, call `model = model.unload()` first, which gives the base model back. To add a second adapter, "
            "choose another name. To replace only this one, call `delete_adapter` first."
        )


def refuse_overlap(model: nn.Module, attachment: Attachment) -> None:
    """Refuse an adapter that adapts a module which trains in full in another adapter, or the other way round.

    A module inside one that trains in full also trains in full.

    Raises:
        ValueError: the two adapters overlap.
    """
    layers, saved = list(adapter_layers(model)), list(saved_modules(model))
    pairs = [(path, other) for path in attachment.layers for other in saved if _lies_in(path, other)]
    for path in attachment.saved_modules:
        pairs += [(path, other) for other in layers if _lies_in(other, path)]
        pairs += [(path, s) for s in saved if s != path and (_lies_in(s, path) or _lies_in(path, s))]
    for path, other in pairs:
        names = f"{path!r}" if path == other else f"{path!r} and {other!r}, of which one holds the other,"
        raise ValueError(
            f"{names} would be adapted by one adapter and train in full in another. Let adapter "
            f"{attachment.adapter!r} treat it as the others do, in `modules_to_save` or `exclude_modules`."
        )


def _lies_in(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def apply_attachment(model: nn.Module, attachment: Attachment) -> None:
    """Put the adapter into the model. It neither acts nor trains yet. If this fails half-way, call `detach`.

    The first adapter freezes the whole model. Another one does not change which parameters train.
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
    """Call ``prepare`` on the module. Its errors name the path."""
    try:
        return prepare(module)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


def follow(model: nn.Module, adapter: str, active: list[str], enabled: bool) -> None:
    """Give the layers of ``adapter`` the model's current state: the active adapters, and whether they are enabled."""
    for layer in adapter_layers(model, adapter).values():
        layer.active_adapters, layer.adapters_enabled = list(active), enabled
    for module in saved_modules(model).values():
        if adapter in module.modules_to_save:
            module.adapters_enabled = enabled


def check_compute_dtype(dtype: Any) -> None:
    """Check that ``dtype`` is a dtype that an adapter can compute in, or None.

    Raises:
        TypeError: ``dtype`` is not a floating-point dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"`adapter_compute_dtype` must be a floating-point dtype, such as torch.float32, or None, but is {dtype!r}."
        )


def set_compute_dtype(model: nn.Module, adapter: str, dtype: torch.dtype | None) -> None:
    """Let an adapter compute in ``dtype``. None: in the dtypes of each layer's input and output."""
    for layer in adapter_layers(model, adapter).values():
        layer.adapter_compute_dtype.pop(adapter, None)
        if dtype is not None:
            layer.adapter_compute_dtype[adapter] = dtype


def detach(model: nn.Module, adapter: str) -> None:
    """Remove one adapter. Layers without any other adapter get their class back."""
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
    """Remove all adapters. A module that trains in full takes the weights of its first copy in ``keep_saved``."""
    for layer in adapter_layers(model).values():
        restore_layer(layer)
    for module in saved_modules(model).values():
        restore_saved_module(
            module, next((name for name in keep_saved if name in module.modules_to_save), None)
        )


def bias_names(model: nn.Module, bias: str, targets: list[str], heads: list[str]) -> Iterator[str]:
    """Names of the bias parameters that ``bias`` ("none", "all" or "lora_only") trains."""
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
    """Let the biases that ``config.bias`` names train, or freeze them."""
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
        if gaussian and len(A) > rank:  # in a stack the standard deviation is that of one matrix
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
    """Refuse ranks that only take memory: the rank of an update is at most the smaller width."""
    most = max(min(d_in, d_out), _RANK_THAT_NEVER_HURTS)
    if rank > most:
        raise ValueError(
            f"Rank {rank} is too large for {path!r}, which has {d_in} inputs and {d_out} outputs: set it to at most "
            f"{most}."
        )


def factor_options(layer: nn.Module) -> dict[str, Any]:
    """Device and dtype of a layer's adapter: those of the base layer, but the dtype is float32 or wider."""
    held = (getattr(layer, name, None) for name in ("weight", "qweight"))
    weight = next(each for each in held if isinstance(each, Tensor))
    wide = weight.is_floating_point() and weight.element_size() >= 4
    device = _execution_device(layer) if weight.is_meta else weight.device
    return {"device": device, "dtype": weight.dtype if wide else torch.float32}


def _execution_device(layer: nn.Module) -> Any:
    """The device on which a layer computes, if Accelerate loads its weight for each forward pass."""
    layer = layer.owner if isinstance(layer, ParameterSlot) else layer
    hook = vars(layer).get("_hf_hook")
    hooks = [hook, *getattr(hook, "hooks", ())]
    devices = (getattr(each, "execution_device", None) for each in hooks)
    return next((device for device in devices if device is not None), "meta")


def _resolved(
    model: nn.Module, config: LoraConfig, targets: Mapping[str, nn.Module], heads: list[str]
) -> LoraConfig:
    """Replace defaults in the configuration by the names that were found, so that it means the same everywhere."""
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
    """Short names that match exactly ``paths``, or the paths themselves if short names would match more."""
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
