"""Checks whether the contents of an adapter folder fit a model. The model does not change."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rankwise.adapters import adapters_for
from rankwise.attach.attachment import (
    Factors,
    base_scaling,
    factor_options,
    plain_name,
)
from rankwise.attach.embeddings import input_embeddings, output_embeddings
from rankwise.attach.matching import matcher, pattern_value, saved_module_of
from rankwise.attach.targets import (
    find_targets,
    modules_to_save_paths,
    own_modules,
    parameter_targets,
)
from rankwise.config import CONFIG_NAME, AdaLoraConfig, LoraConfig
from rankwise.config.suggest import suggestion
from rankwise.files.tensors import check_finite
from rankwise.storage.adapter_file import AdapterFile, kept_by_pattern, name_parameters
from rankwise.storage.nesting import by_owner

# With PEFT's bias="all", the biases of whole modules are stored a second time.
_DOUBLES = (
    "original_module.",
    "modules_to_save.",
)


def fit_all(
    model: nn.Module, file: AdapterFile, config: LoraConfig, all_parameters: bool = False
) -> tuple[dict[str, Factors], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The layers, modules saved in full and single parameters in the file. All have been checked to fit the model."""
    modules = {plain_name(path): module for path, module in own_modules(model).items()}
    modules |= _slots(model, config, file)
    if all(path in modules for path in file.factors):  # otherwise `_fit` reports the first that is not
        _check_all_layers(model, modules, config, file)
    layers = {path: _fit(modules, path, factors, config, file) for path, factors in file.factors.items()}
    heads: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in file.others.items():
        path = saved_module_of(name, config.modules_to_save or (), modules.__contains__)
        inner = name if path is None else name.removeprefix(f"{path}.")
        if path is None:
            rest[name.replace(".base_layer.", ".")] = tensor
        elif not inner.startswith(_DOUBLES):
            heads.setdefault(path, {})[inner] = tensor
    _check_all_heads(model, modules, config, heads, file)
    for path, tensors in heads.items():
        _fit_head(modules[path], path, tensors, file)
        inside = next((each for each in layers if each == path or each.startswith(f"{path}.")), None)
        if inside is not None:
            raise ValueError(f"{file.source} adapts {inside!r}, but also holds all of {path!r}.")
    _fit_rest(model, modules, rest, file, None if all_parameters else config)
    return layers, heads, rest


def with_all_heads(config: LoraConfig, heads: Iterable[str]) -> LoraConfig:
    """Name further modules to save: PEFT's file also holds modules whose paths only end like the configured names."""
    names = config.modules_to_save or []
    more = [path for path in heads if not matcher(names)(path)]
    return replace(config, modules_to_save=[*names, *more]) if more else config


def _slots(model: nn.Module, config: LoraConfig, file: AdapterFile) -> dict[str, nn.Module]:
    """The slots of the adapted parameters, by path. The file's factors are moved to these paths."""
    if not config.target_parameters:
        return {}
    try:
        slots = parameter_targets(model, replace(config, inference_mode=True))
    except ValueError as error:
        raise ValueError(f"{file.source}: {error}") from None
    owners = by_owner(map(plain_name, slots))
    if not isinstance(config, AdaLoraConfig):
        name_parameters(file, lambda owner: [path.rpartition(".")[2] for path in owners.get(owner, ())])
    return {plain_name(path): slot for path, slot in slots.items()}


def _fit_rest(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    rest: Mapping[str, Tensor],
    file: AdapterFile,
    config: LoraConfig | None,
) -> None:
    """Check single parameters: biases that ``config`` trains, and embeddings; any parameters without ``config``."""
    own = {plain_name(name): value for name, value in model.named_parameters(remove_duplicate=False)}
    embeddings = {id(module) for find in (input_embeddings, output_embeddings) for module in find(model)}
    for name, tensor in rest.items():
        if name not in own:
            raise ValueError(f"{file.source}: the model has no {name!r}.{suggestion(name, own)}")
        module = modules.get(name.rpartition(".")[0], model)
        kind = adapters_for(module)
        embeds = id(module) in embeddings or (kind is not None and kind.base_in_file)
        if own[name].shape != tensor.shape:
            raise ValueError(_shape_message(file, name, tensor, own[name].shape, embeds))
        bias = config is not None and config.bias != "none" and name.endswith("bias")
        if (
            not (config is None or bias or embeds)
            or tensor.is_floating_point() != own[name].is_floating_point()
        ):
            raise ValueError(
                f"{file.source} would replace {name!r} of the model itself, which is neither in `modules_to_save` "
                "nor a bias that `bias` names."
            )
        check_finite(file.source, name, tensor.to(own[name].dtype))


def _check_all_layers(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, file: AdapterFile
) -> None:
    """Refuse a file that lacks a layer that `target_modules` selects, if these layers can be determined.

    Warns:
        UserWarning: the file has a layer that is not selected.
    """
    if config.target_modules is None:
        return
    try:
        targets = find_targets(model, replace(config, inference_mode=True))
    except (TypeError, ValueError):  # some selected layers can't be adapted: the file tells which ones were
        return
    selected = [plain_name(path) for path in targets]
    for path in selected:
        if path not in file.factors:
            raise ValueError(
                f"{file.source} has no tensors of {path!r}, which {CONFIG_NAME} names in `target_modules`."
            )
    more = [path for path in modules if path in file.factors and path not in selected]
    if more:
        warnings.warn(
            f"{file.source} adapts {more[0]!r}{' and more' if len(more) > 1 else ''}, which {CONFIG_NAME} does not "
            "select. rankwise loads all layers that a file holds; PEFT leaves such layers out.",
            UserWarning,
            stacklevel=2,
        )


def _check_all_heads(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    heads: Mapping[str, Any],
    file: AdapterFile,
) -> None:
    """Refuse a file that lacks a module in `modules_to_save`, because an untrained head is useless."""
    named = [name for name in config.modules_to_save or () if any(map(matcher([name]), modules))]
    wanted = (
        modules_to_save_paths(model, replace(config, modules_to_save=named, task_type=None)) if named else ()
    )
    for path in wanted:
        if path not in heads and _plain_state(modules[path]):
            raise ValueError(
                f"{file.source} has no tensors of {path!r}, which {CONFIG_NAME} names in `modules_to_save`."
            )


def _fit(
    modules: Mapping[str, nn.Module],
    path: str,
    factors: dict[str, Tensor],
    config: LoraConfig,
    file: AdapterFile,
) -> Factors:
    layer = modules.get(path)
    if layer is None:
        raise ValueError(
            f"{file.source} adapts {path!r}, which the model does not have.{suggestion(path, modules)} "
            "Load the adapter into the base model that it was trained on."
        )
    mixin = adapters_for(layer)
    if mixin is None:
        raise ValueError(
            f"{file.source} adapts {path!r}, but here it is a {type(layer).__name__}, which can't be adapted."
        )
    adalora = isinstance(config, AdaLoraConfig)
    found = dict(factors)
    if file.laid_out:
        found = {name: mixin.from_file(layer, name, tensor, adalora) for name, tensor in factors.items()}
    rank = config.init_r if adalora else pattern_value(config.rank_pattern or {}, path, config.r)  # type: ignore
    scale, matrices = base_scaling(config, path, rank), mixin.blocks(layer)
    if file.of_weight:
        found["A"], found["B"] = mixin.as_lora(layer, found["A"], found["B"])
        rank *= len(found["A"]) // max(len(factors["A"]), 1)
    rows = len(found["A"])
    if not adalora and matrices * rank != rows and rows % rank == 0 and matrices > 1:
        raise ValueError(_other_stack(file, path, rows // rank, matrices))
    if not adalora and mixin.rank_of(layer, found["A"]) != rank:
        raise ValueError(
            f"{file.source}: {path!r} has rank {mixin.rank_of(layer, found['A'])}, but {CONFIG_NAME} gives it rank "
            f"{rank} by `r` and `rank_pattern`."
        )
    shape_A, shape_B = mixin.factor_shapes(layer, rank, adalora)
    if adalora and matrices > 1:
        _check_stack(file, path, matrices, config)
    if adalora:  # the file holds only the triplets that were kept
        shape_A, shape_B = (rows, shape_A[1]), (shape_B[0], rows)
    shapes = {"A": shape_A, "B": shape_B, "E": (rows, 1)}
    for name, tensor in found.items():
        if tensor.shape != shapes[name]:
            raise ValueError(_shape_message(file, f"{path}.lora_{name}", tensor, shapes[name]))
    # Copies, because the tensors may share memory with the file, which may be changed.
    options = {**factor_options(layer), "copy": True}
    made = {name: tensor.to(**options) for name, tensor in found.items()}
    for name, tensor in made.items():  # checked again: a number may overflow the new dtype
        if tensor.dtype != factors[name].dtype:
            check_finite(file.source, f"{path}.lora_{name}", tensor)
    return Factors(made["A"], made["B"], made.get("E"), scale)


def _check_stack(file: AdapterFile, path: str, matrices: int, config: LoraConfig) -> None:
    init_r: int = config.init_r  # type: ignore[attr-defined]
    listed = kept_by_pattern(config).get(path)
    held = len(file.factors[path]["A"] if listed is None else listed) // init_r
    if held != matrices:
        raise ValueError(_other_stack(file, path, held, matrices))


def _other_stack(file: AdapterFile, path: str, held: int, matrices: int) -> str:
    return (
        f"{file.source}: {path!r} is adapted as a stack of {held} matrices, but this model's has {matrices} (experts): "
        "the adapter belongs to another model."
    )


def _shape_message(
    file: AdapterFile, name: str, tensor: Tensor, shape: Iterable[int], embeds: bool = False
) -> str:
    found, wanted = tuple(tensor.shape), tuple(shape)
    if embeds and found[1:] == wanted[1:]:
        mend = f"call `model.resize_token_embeddings({found[0]})` on the base before loading."
        return (
            f"{file.source}: {name} has {found[0]} rows, but this model's has {wanted[0]}. The adapter was saved after "
            f"the vocabulary was resized: {mend}"
        )
    return (
        f"{file.source}: {name} is {found}, but this model takes {wanted}. The adapter belongs "
        "to a model of other shapes: load the base model that it was trained on."
    )


def _fit_head(module: nn.Module, path: str, tensors: Mapping[str, Tensor], file: AdapterFile) -> None:
    own = _plain_state(module)
    for key in own.keys() ^ tensors.keys():
        where = "the model" if key in own else file.source
        raise ValueError(
            f"{file.source}: only {where} has {path}.{key}; the adapter belongs to another model."
        )
    parameters = dict(module.named_parameters())
    for key, tensor in tensors.items():
        if own[key].shape != tensor.shape:
            embeds = isinstance(module, nn.Embedding)
            raise ValueError(_shape_message(file, f"{path}.{key}", tensor, own[key].shape, embeds))
        if own[key].is_floating_point() != tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(
                f"{file.source}: {path}.{key} is {tensor.dtype}, but the model has {own[key].dtype}."
            )
        if key in parameters:  # a buffer may hold infinities, as a mask does
            check_finite(file.source, f"{path}.{key}", tensor.to(own[key].dtype))


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    return {
        key: value for key, value in module.state_dict().items() if not key.startswith("modules_to_save.")
    }
