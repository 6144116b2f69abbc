"""Finds the modules of a model that a configuration names.

Names match as in PEFT: a name in a list is a whole path or its last parts, and a string is a regular expression for
whole paths. PEFT ignores a name that matches nothing. Here it is a warning or an error. A layer is also refused if the
model reads its weight without calling the layer, because an adapter on it would do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from rankwise.adapters import AdapterLayer, ParameterSlot, in_all_linear
from rankwise.adapters.owner import SLOTS, ParameterOwner
from rankwise.adapters.saved import SavedModule
from rankwise.attach.defaults import ADALORA_DEFAULTS, DEFAULTS, HEADS
from rankwise.attach.embeddings import output_embeddings
from rankwise.attach.matching import in_layers, matcher, within
from rankwise.attach.parameters import find_parameters, layer_at, tell_of_experts
from rankwise.attach.refusals import (
    adaptable,
    check_heads,
    check_layer,
    check_names,
    linear_names,
    nearest_name,
    nothing_found,
)
from rankwise.attach.selectors import tell_of_idle_selectors, tell_of_second_names
from rankwise.config import AdaLoraConfig, LoraConfig

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Find the layers and the parameters that ``config`` adapts.

    A layer with several paths is found once, under the first. Layers in ``modules_to_save`` and in the heads that
    ``task_type`` implies are never among them.

    Returns:
        The layers by path, in the model's order, and after them the slots of adapted parameters.

    Raises:
        ValueError: no layer matches, or a matching layer cannot be adapted. The message says what to write instead.

    Warns:
        UserWarning: one of several selectors selects nothing; see `tell_of_idle_selectors`. Or a layer has several
            names; see `tell_of_second_names`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(find_targets(model, LoraConfig(target_modules=["0"])))
        ['0']
        >>> list(find_targets(model, LoraConfig(target_modules="all-linear")))
        ['0', '2']
    """
    modules = own_modules(model)
    saved = modules_to_save_paths(model, config)
    names: list[str] | str = []
    layers: dict[str, nn.Module] = {}
    if not _only_parameters(model, config):
        names, chosen_by_user = _target_names(model, config)
        layers = _find_layers(model, modules, saved, config, names, chosen_by_user)
    slots = find_parameters(modules, config, layers, saved)
    if config.target_modules == "all-linear" and not config.inference_mode:
        tell_of_experts(modules, slots)
    targets = {**layers, **slots}
    tell_of_second_names(model, layers)
    if not config.inference_mode:
        tell_of_idle_selectors(modules, names, targets, config)
    return targets


def parameter_targets(model: nn.Module, config: LoraConfig) -> dict[str, ParameterSlot]:
    """The parameters that ``config`` adapts, by path; see `find_parameters`."""
    return find_parameters(own_modules(model), config, (), modules_to_save_paths(model, config))


def _only_parameters(model: nn.Module, config: LoraConfig) -> bool:
    """Whether only parameters are adapted: the list of layers is empty, or the model has no default layers."""
    unknown = config.target_modules is None and (_model_type(model) or "") not in _defaults(config)
    return bool(config.target_parameters) and (config.target_modules == [] or unknown)


def _find_layers(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    saved: list[str],
    config: LoraConfig,
    names: list[str] | str,
    chosen_by_user: bool,
) -> dict[str, nn.Module]:
    if chosen_by_user and not config.inference_mode:
        check_names(modules, config)
    check_heads(modules, saved, config)
    matches = frozenset(names).__contains__ if config.target_modules == "all-linear" else matcher(names)
    excluded = matcher(config.exclude_modules or [])
    matched = [path for path in modules if matches(path) and in_layers(path, names, config)]
    free = [path for path in matched if not within(path, saved) and not excluded(path)]
    targets = {path: modules[path] for path in free}
    if chosen_by_user:
        for path, module in targets.items():
            check_layer(model, path, module, config)
    else:
        targets = dict(adaptable(model, targets, config, _with_shared_weight(model, targets)))
    if not targets:
        raise ValueError(nothing_found(modules, matched, saved, names, config))
    return targets


def modules_to_save_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that train in full: those in ``modules_to_save``, and the heads that ``task_type`` implies.

    A name is a whole path or its last parts: "classifier" does not match "pre_classifier".

    Raises:
        ValueError: a name in ``modules_to_save`` matches nothing, or a container such as ``nn.ModuleList``.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "score": nn.Linear(4, 2)})
        >>> modules_to_save_paths(model, LoraConfig(task_type="SEQ_CLS"))
        ['score']
    """
    modules = own_modules(model)
    paths = list(modules)
    implied = HEADS.get(config.task_type or "", ())
    for name in config.modules_to_save or ():
        if name not in implied and not any(map(matcher([name]), paths)):
            raise ValueError(
                f"`modules_to_save` names {name!r}, but the model has no such module.{nearest_name(name, paths)}"
            )
    means = matcher([*(config.modules_to_save or ()), *implied])
    found: list[str] = []
    for path in paths:
        if means(path) and not within(path, found):
            found.append(path)
    for path in found:
        if isinstance(modules[path], _CONTAINERS):
            raise ValueError(
                f"`modules_to_save` takes {path!r}, a {type(modules[path]).__name__}, which is never called as a "
                "module: name the modules in it."
            )
    return found


def find_tied(model: nn.Module, targets: Iterable[str]) -> dict[str, list[str]]:
    """Find the paths of the modules that share parameters with a target, by the target's path.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
        >>> model["head"].weight = model["embed"].weight
        >>> find_tied(model, ["head"])
        {'head': ['embed']}
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    tied: dict[str, list[str]] = {}
    for path in targets:
        layer, holder = layer_at(model, path), path
        held = list(layer.parameters(recurse=False))
        if isinstance(layer, ParameterSlot):
            held, holder = [layer.weight], path.rpartition(".")[0]
        others = dict.fromkeys(other for each in held for other in owners[id(each)] if other != holder)
        if others:
            tied[path] = list(others)
    return tied


def _with_shared_weight(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, str]:
    """The path of a module that shares the target's weight, by the path of each target that has such a module."""
    others = find_tied(model, targets)
    return {
        path: next(each for each in tied if _has_weight(model, each, targets[path]))
        for path, tied in others.items()
        if any(_has_weight(model, each, targets[path]) for each in tied)
    }


def _has_weight(model: nn.Module, path: str, layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and any(
        each is weight for each in model.get_submodule(path)._parameters.values()
    )


# Modules of the model


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by path, without the model itself and the modules that adapters have added."""
    own: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        holder = own.get(parent, model)
        inside_adapter = parent and parent not in own
        factors = isinstance(holder, AdapterLayer) and last in ("lora_A", "lora_B", "lora_E")
        slots = isinstance(holder, ParameterOwner) and last == SLOTS
        copies = isinstance(holder, SavedModule) and last == "modules_to_save"
        if path and not (inside_adapter or factors or slots or copies):
            own[path] = module
    return own


def _model_type(model: nn.Module) -> str | None:
    """``config.model_type`` of the model, or of the first model inside a user's own model."""
    kinds = (getattr(getattr(module, "config", None), "model_type", None) for module in model.modules())
    return next((kind for kind in kinds if isinstance(kind, str) and kind), None)


# Matching


def _target_names(model: nn.Module, config: LoraConfig) -> tuple[list[str] | str, bool]:
    """The names or the expression to match, and whether the user chose them."""
    if config.target_modules == "all-linear":
        heads = {id(module) for module in output_embeddings(model)}
        own = own_modules(model).items()
        return [path for path, module in own if in_all_linear(module) and id(module) not in heads], False
    if config.target_modules is not None:
        return config.target_modules, True
    kind = _model_type(model)
    known = _defaults(config)
    if kind is None or kind not in known:
        about = f"the architecture {kind!r}" if kind else "a model without `config.model_type`"
        raise ValueError(
            f"There are no default targets for {about}: set `target_modules`, for example to "
            f"'all-linear' or to some of its layers. {linear_names(own_modules(model))}"
        )
    return known[kind], False


def _defaults(config: LoraConfig) -> Mapping[str, list[str] | str]:
    return ADALORA_DEFAULTS if isinstance(config, AdaLoraConfig) else DEFAULTS
