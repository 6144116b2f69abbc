"""Adapter folders in PEFT's format, and what resuming needs beside them.

    adapter_config.json            the configuration, in PEFT's spelling
    adapter_model.safetensors      the factors, cut to the triplets that stay
    rank_history.json              budget and ranks over the run (AdaLoRA)
    training_state.safetensors     uncut factors, scores, masks and step of an unfinished run; not for sharing

Loading runs no code from a folder: tensors come from safetensors, or from ``adapter_model.bin`` with
``weights_only=True``. It opens no file outside the folder. Shapes are compared with the model before any tensor is
read from the disk, and everything is checked before the model changes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise import zero
from rankwise.adapters import AdapterLayer, adapters_for
from rankwise.atomic import read_folder, write_folder
from rankwise.attach import (
    Attachment,
    Factors,
    adapter_layers,
    base_scaling,
    bias_names,
    check_adapter_name,
    factor_options,
    plain_name,
    saved_modules,
)
from rankwise.config import CONFIG_NAME, AdaLoraConfig, LoraConfig
from rankwise.controller import BUFFERS, Controller
from rankwise.distributed import gather, like, local, local_like
from rankwise.history import RankHistory
from rankwise.runstate import RunState
from rankwise.suggest import suggestion
from rankwise.targets import (
    find_targets,
    modules_to_save_paths,
    output_embeddings,
    own_modules,
    pattern_value,
)
from rankwise.tensorfile import check_finite, read_pickle, read_tensor_file, write_tensor_file

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
HISTORY_NAME = "rank_history.json"
TRAINING_STATE_NAME = "training_state.safetensors"
OWNED = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, HISTORY_NAME, TRAINING_STATE_NAME)
PREFIX = "base_model.model."
NO_SCHEDULE = 1  # total_step in a file whose run had no length yet: no run is as short

_EXTRA = "_extra_state"  # PyTorch's key for what `get_extra_state` gives

_DOUBLES = (
    "original_module.",
    "modules_to_save.",
)  # the biases of whole modules, again, by PEFT's bias="all"
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[ABE])(?:\.weight)?")


@dataclass
class AdapterFile:
    """The content of an adapter folder, checked as far as that goes without a model."""

    source: str
    config: LoraConfig
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> {"A": …, "B": …, "E": …}
    others: dict[str, Tensor] = field(default_factory=dict)  # biases and modules saved whole
    embeddings: set[str] = field(default_factory=set)  # paths of factors that are an embedding's
    history: RankHistory | None = None
    training: dict[str, Tensor] | None = None  # content of TRAINING_STATE_NAME
    training_source: str = ""


# Reading.


def read_adapter(folder: Path, training_state: bool = False) -> AdapterFile:
    """Read an adapter folder, with ``training_state`` also the state of the run, if there is one.

    Raises:
        FileNotFoundError: it is no adapter folder.
        TypeError, ValueError: a file is broken or does not fit the others; the message names it.
    """
    return read_folder(folder, OWNED, lambda found: _read(found, training_state))


def _read(folder: Path, training_state: bool) -> AdapterFile:
    config = LoraConfig.from_pretrained(folder)
    tensors, source = _read_tensors(folder)
    file = _sorted(source, config, tensors)
    _check_factors(file)
    if _holds(folder, HISTORY_NAME):
        file.history = RankHistory.load(folder / HISTORY_NAME)
        if set(file.history.layers) != set(file.factors):
            raise ValueError(
                f"{folder / HISTORY_NAME} is of other layers than {source}: one is another adapter's."
            )
    if training_state and _holds(folder, TRAINING_STATE_NAME):
        file.training_source = str(folder / TRAINING_STATE_NAME)
        file.training = read_tensor_file(folder / TRAINING_STATE_NAME)
        _check_same_run(file)
    return file


def _holds(folder: Path, name: str) -> bool:
    """Whether a folder has this file; what has its name and is something else is refused."""
    path = folder / name
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{path} should be a file, but is a folder, a device or a link that leads nowhere.")
    return path.is_file()


def _check_same_run(file: AdapterFile) -> None:
    """Refuse a state that is not the one that the adapter's tensors were cut from."""
    pattern = _kept_by_pattern(file.config)
    for path, factors in file.factors.items():
        for name, tensor in factors.items():
            whole = (file.training or {}).get(f"{path}.lora_{name}")
            if whole is not None and whole.dim() == 2 and path in pattern:
                kept = torch.tensor(pattern[path])
                whole = whole[:, kept[: whole.shape[1]]] if name == "B" else whole[kept[: whole.shape[0]]]
            if whole is None or whole.dim() != 2 or not torch.equal(whole, tensor.flatten(1)):
                raise ValueError(
                    f"{file.training_source} and {file.source} differ in lora_{name} of {path!r}: they were not "
                    f"saved together. Use another checkpoint; or remove {TRAINING_STATE_NAME}, and the adapter's "
                    "values are taken without the run."
                )
    held = {key.replace(".modules_to_save.", "."): tensor for key, tensor in (file.training or {}).items()}
    for key, tensor in file.others.items():
        whole = held.get(key.replace(".base_layer.", "."))
        if whole is not None and not torch.equal(whole, tensor):
            raise ValueError(
                f"{file.training_source} and {file.source} differ in {key!r}: they were not saved together."
            )


def read_model_adapter(model: Any, adapter: str) -> AdapterFile:
    """What `read_adapter` would give of an adapter of ``model`` that has just been saved.

    Raises:
        ValueError: the model has no such adapter.
    """
    if adapter not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter!r}; the model has {sorted(model.peft_config)}.")
    config, controller = model.peft_config[adapter], model._controller_of(adapter)
    state = plain_state(model.state_dict())
    kept = controller.kept_triplets(state) if controller else {}
    tensors = adapter_tensors(model, adapter, config, state, kept)
    return _sorted(f"The adapter {adapter!r}", config, tensors)


def _sorted(source: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> AdapterFile:
    file = AdapterFile(source, config)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(name):
            own = file.factors.setdefault(match["path"], {})
            if match["factor"] in own:
                raise ValueError(f"{source} holds lora_{match['factor']} of {match['path']!r} twice.")
            own[match["factor"]] = tensor
            if match["embedding"]:
                file.embeddings.add(match["path"])
        else:
            file.others[name] = tensor
    return file


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    if _holds(folder, WEIGHTS_NAME):
        return read_tensor_file(folder / WEIGHTS_NAME), str(folder / WEIGHTS_NAME)
    if not _holds(folder, PICKLE_NAME):
        raise FileNotFoundError(f"{str(folder)!r} holds no {WEIGHTS_NAME}, so it is not a whole adapter.")
    return read_pickle(folder / PICKLE_NAME), str(folder / PICKLE_NAME)


def _check_factors(file: AdapterFile, cut: bool = True) -> None:
    """Check kinds, numbers and dimensions of the factors; if ``cut`` to `rank_pattern`, also the ranks."""
    adalora = isinstance(file.config, AdaLoraConfig)
    wanted = {"A", "B", "E"} if adalora else {"A", "B"}
    if not file.factors and not file.others:
        raise ValueError(f"{file.source} holds no adapter tensors.")
    for path, factors in file.factors.items():
        if set(factors) != wanted:
            raise ValueError(
                f"{file.source}: {path!r} has the factors {sorted(factors)}, but {file.config.peft_type} takes "
                f"{sorted(wanted)}. The file is incomplete or mislabelled in {CONFIG_NAME}."
            )
        for name, tensor in factors.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{file.source}: lora_{name} of {path!r} is {tensor.dtype}, not floating point."
                )
            if tensor.dim() != 2 and (adalora or tensor.dim() != 4):
                raise ValueError(
                    f"{file.source}: lora_{name} of {path!r} should be a matrix, but has shape {tuple(tensor.shape)}."
                )
            check_finite(file.source, f"lora_{name} of {path!r}", tensor)
    if adalora and not file.factors:
        raise ValueError(f"{file.source} holds no lora_A, lora_E and lora_B, but {CONFIG_NAME} says ADALORA.")
    if adalora and cut:
        _check_rank_pattern(file)


def _check_rank_pattern(file: AdapterFile) -> None:
    config: AdaLoraConfig = file.config  # type: ignore[assignment]
    pattern = _kept_by_pattern(config)
    unknown = sorted(set(pattern) - set(file.factors))
    if unknown:
        raise ValueError(
            f"{CONFIG_NAME}: `rank_pattern` names {unknown[0]!r}, of which {file.source} has no tensors."
        )
    for path, factors in file.factors.items():
        rank = sum(pattern[path]) if path in pattern else config.init_r
        shapes = {name: tuple(tensor.shape) for name, tensor in factors.items()}
        if factors["E"].shape != (rank, 1) or factors["A"].shape[0] != rank or factors["B"].shape[-1] != rank:
            raise ValueError(
                f"{file.source}: {path!r} should have {rank} triplets by {CONFIG_NAME} "
                f"({'`rank_pattern`' if path in pattern else '`init_r`'}), but its tensors are {shapes}."
            )


def plan_from_file(model: nn.Module, file: AdapterFile, adapter: str, trainable: bool) -> Attachment:
    """Fit an adapter folder's content to ``model``, which stays as it is.

    Raises:
        ValueError: it belongs to another model; the message names the first layer that differs.
    """
    check_adapter_name(model, adapter)
    changes: dict[str, Any] = {"inference_mode": not trainable}
    if trainable and isinstance(file.config, AdaLoraConfig) and file.config.total_step == NO_SCHEDULE:
        changes["total_step"] = None
    config = _changed(file, **changes)
    layers, heads, rest = _fit_all(model, file, config)
    return Attachment(adapter, config, layers, heads, rest)  # type: ignore[arg-type]


def plan_from_training_state(model: nn.Module, file: AdapterFile, adapter: str) -> Attachment:
    """Fit a run's state, with all of its triplets, to ``model``, which stays as it is; then load the rest of it.

    Raises:
        ValueError: as `plan_from_file`.
    """
    check_adapter_name(model, adapter)
    buffers = {*BUFFERS, _EXTRA, *(name for name, _ in model.named_buffers())}
    uncut = _sorted(file.training_source, file.config, {
        key.replace(".modules_to_save.", "."): tensor
        for key, tensor in (file.training or {}).items() if key not in buffers
    })  # fmt: skip
    _check_factors(uncut, cut=False)
    _fit_all(model, file, file.config)
    changes: dict[str, Any] = {"inference_mode": False}
    if isinstance(file.config, AdaLoraConfig):
        changes["rank_pattern"] = None
        if _run_state(file, list(uncut.factors)).schedule is None:
            changes["total_step"] = None
    uncut.config = _changed(file, **changes)
    layers, heads, rest = _fit_all(model, uncut, uncut.config, all_parameters=True)
    return Attachment(adapter, uncut.config, layers, heads, rest)  # type: ignore[arg-type]


def _run_state(file: AdapterFile, layers: list[str]) -> RunState:
    try:
        return RunState.from_tensor(layers, (file.training or {})[_EXTRA])
    except KeyError:
        raise ValueError(f"{file.training_source} lacks {_EXTRA!r}.") from None
    except ValueError as error:
        raise ValueError(f"{file.training_source}: {error}") from None


def _changed(file: AdapterFile, **changes: Any) -> LoraConfig:
    try:
        return replace(file.config, **changes)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{Path(file.source).with_name(CONFIG_NAME)}: {error}") from None


def prepare_values(
    model: nn.Module, adapter: str, file: AdapterFile, controller: Controller | None
) -> Callable[[], None]:
    """Check that an attached adapter can take the values in a file; its choice of ranks becomes the file's.

    Returns:
        What brings the adapter to these values.

    Raises:
        ValueError: they belong to another adapter.
    """
    layers, heads, rest = _fit_all(model, file, file.config)
    own = adapter_layers(model, adapter)
    copies = {path: m for path, m in saved_modules(model).items() if adapter in m.modules_to_save}
    for path in (own.keys() ^ layers.keys()) | (copies.keys() ^ heads.keys()):
        where = "the model" if path in own or path in copies else file.source
        raise ValueError(f"{file.source}: only {where} adapts {path!r}; this is another adapter.")
    kept = {path: _places(own[path], adapter, path, factors, file) for path, factors in layers.items()}
    all_parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}

    @torch.no_grad()
    def load() -> None:
        for path, factors in layers.items():
            parameters = own[path].adapter_parameters(adapter)
            for key, value in (("lora_A", factors.A), ("lora_E", factors.E), ("lora_B", factors.B)):
                if value is not None:
                    whole = value if factors.E is None else _spread(value, key == "lora_B", kept[path])
                    local(parameters[key]).copy_(local_like(whole, parameters[key]))
        for path, tensors in heads.items():
            copy = copies[path].modules_to_save[adapter]
            copy.load_state_dict(_laid_out(tensors, copy.state_dict()))
        for name, value in rest.items():
            local(all_parameters[name]).copy_(local_like(value, all_parameters[name]))
        if controller is not None:
            controller.take_over(kept, file.history)

    return load


def _spread(value: Tensor, is_B: bool, kept: Tensor) -> Tensor:
    """A factor with triplets of zeros where ``kept`` is False."""
    rows = value.T if is_B else value
    spread = rows.new_zeros(len(kept), rows.shape[1])
    spread[kept] = rows
    return spread.T if is_B else spread


def _places(layer: AdapterLayer, adapter: str, path: str, factors: Factors, file: AdapterFile) -> Tensor:
    """(r,) bool: which of the attached triplets the file's triplets are."""
    held, rank = layer.lora_A[adapter].shape[0], factors.A.shape[0]
    alike = (adapter in layer.lora_E) == (factors.E is not None)
    if not alike or not math.isclose(layer.scaling[adapter], factors.scaling, rel_tol=1e-6):
        raise ValueError(
            f"{file.source}: the adapter in the file is of another kind, or scaled in another way (`lora_alpha` and "
            f"rank), than the one that is attached: {path!r} has the scale {factors.scaling:.6g} there, and "
            f"{layer.scaling[adapter]:.6g} here. Attach it with the configuration that it was saved with."
        )
    places = torch.zeros(held, dtype=torch.bool)
    listed = _kept_by_pattern(file.config).get(path)
    if listed is not None and rank < held:
        places[: len(listed)] = torch.tensor(listed[:held], dtype=torch.bool)
    else:
        places[:rank] = True
    if rank > held or int(places.sum()) != rank or (factors.E is None and rank < held):
        raise ValueError(f"{file.source}: {path!r} has rank {rank}, but the attached adapter {held}.")
    return places


def _kept_by_pattern(config: LoraConfig) -> dict[str, list[bool]]:
    """AdaLoRA's `rank_pattern` by module path."""
    pattern = (config.rank_pattern or {}) if isinstance(config, AdaLoraConfig) else {}
    return {key.removesuffix(".lora_E").removeprefix(PREFIX): kept for key, kept in pattern.items()}


def _laid_out(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors to load, sharded where those in the state dictionary ``own`` are."""
    return {key: like(tensor, own[key]) for key, tensor in tensors.items()}


def _fit_all(
    model: nn.Module, file: AdapterFile, config: LoraConfig, all_parameters: bool = False
) -> tuple[dict[str, Factors], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Layers, modules saved whole and single parameters of the file, all checked to fit the model."""
    modules = {plain_name(path): module for path, module in own_modules(model).items()}
    _check_all_layers(model, config, file)
    layers = {path: _fit(modules, path, factors, config, file) for path, factors in file.factors.items()}
    heads: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in file.others.items():
        path = _head_of(name, config, modules)
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


def _fit_rest(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    rest: Mapping[str, Tensor],
    file: AdapterFile,
    config: LoraConfig | None,
) -> None:
    """Check single parameters: biases if ``config`` trains them, embeddings; any if there is no ``config``."""
    own = {plain_name(name): value for name, value in model.named_parameters(remove_duplicate=False)}
    embeddings = [*output_embeddings(model), *(m for m in modules.values() if isinstance(m, nn.Embedding))]
    for name, tensor in rest.items():
        if name not in own:
            raise ValueError(f"{file.source}: the model has no {name!r}.{suggestion(name, own)}")
        if own[name].shape != tensor.shape:
            raise ValueError(_shape_message(file, name, tensor, own[name].shape))
        embeds = any(modules.get(name.rpartition(".")[0]) is each for each in embeddings)
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


def _check_all_layers(model: nn.Module, config: LoraConfig, file: AdapterFile) -> None:
    """Refuse a file that lacks one of the layers that `target_modules` means, where that can be told."""
    if config.target_modules is None:
        return
    try:
        targets = find_targets(model, replace(config, inference_mode=True))
    except (TypeError, ValueError):  # some of its layers can't be adapted: the file says which were
        return
    for path in map(plain_name, targets):
        if path not in file.factors:
            raise ValueError(
                f"{file.source} has no tensors of {path!r}, which {CONFIG_NAME} names in `target_modules`."
            )


def _check_all_heads(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    heads: Mapping[str, Any],
    file: AdapterFile,
) -> None:
    """Refuse a file that lacks one of the modules in `modules_to_save`: a head that is not trained tells nothing."""
    named = [name for name in config.modules_to_save or () if any(path.endswith(name) for path in modules)]
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
            f"{file.source} adapts {path!r}, but here it is a {type(layer).__name__}, which can't be."
        )
    adalora = isinstance(config, AdaLoraConfig)
    A, B = factors["A"].flatten(1), factors["B"].flatten(1)
    rank = A.shape[0]
    if not adalora and rank != pattern_value(config.rank_pattern or {}, path, config.r):
        raise ValueError(
            f"{file.source}: {path!r} has rank {rank}, but {CONFIG_NAME} gives it rank "
            f"{pattern_value(config.rank_pattern or {}, path, config.r)} by `r` and `rank_pattern`."
        )
    d_in, d_out = mixin.adapter_widths(layer, lora_groups=not adalora)  # type: ignore[arg-type]
    columns = mixin.adapter_columns_of_B(layer, rank, lora_groups=not adalora)  # type: ignore[arg-type]
    for name, tensor, shape in (("A", A, (rank, d_in)), ("B", B, (d_out, columns))):
        if tensor.shape != shape:
            raise ValueError(_shape_message(file, f"{path}.lora_{name}", tensor, shape))
    if adalora and factors["E"].shape != (rank, 1):
        raise ValueError(_shape_message(file, f"{path}.lora_E", factors["E"], (rank, 1)))
    # Copies: what was read may still lie in the file, which somebody may change.
    options = {**factor_options(layer), "copy": True}
    made = {name: tensor.to(**options) for name, tensor in {**factors, "A": A, "B": B}.items()}
    for name, tensor in made.items():  # again: a number may have been too large for the dtype
        if tensor.dtype != factors[name].dtype:
            check_finite(file.source, f"{path}.lora_{name}", tensor)
    return Factors(made["A"], made["B"], made.get("E"), base_scaling(config, path, rank))


def _shape_message(file: AdapterFile, name: str, tensor: Tensor, shape: Iterable[int]) -> str:
    return (
        f"{file.source}: {name} is {tuple(tensor.shape)}, but this model takes {tuple(shape)}. The adapter belongs "
        "to a model of other shapes: load the base model that it was trained on."
    )


def _head_of(name: str, config: LoraConfig, modules: Mapping[str, nn.Module]) -> str | None:
    """The outermost module in `modules_to_save` that holds ``name``; names match as in `modules_to_save_paths`."""
    wanted = tuple(config.modules_to_save or ())
    ends = (match.start() for match in re.finditer(r"\.", name))
    return next((name[:end] for end in ends if name[:end].endswith(wanted) and name[:end] in modules), None)


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
            raise ValueError(_shape_message(file, f"{path}.{key}", tensor, own[key].shape))
        if own[key].is_floating_point() != tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(
                f"{file.source}: {path}.{key} is {tensor.dtype}, but the model has {own[key].dtype}."
            )
        if key in parameters:  # a buffer may hold infinities, such as a mask
            check_finite(file.source, f"{path}.{key}", tensor.to(own[key].dtype))


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    return {
        key: value for key, value in module.state_dict().items() if not key.startswith("modules_to_save.")
    }


# Writing.


def write_adapter(
    folder: Path,
    model: nn.Module,
    adapter: str,
    config: LoraConfig,
    controller: Controller | None,
    state_dict: Mapping[str, Tensor] | None = None,
    training_state: bool = False,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter folder, all or nothing.

    Args:
        folder: made if need be; files of others in it stay.
        model: the adapted model.
        adapter: which of its adapters.
        config: the adapter's configuration.
        controller: the one that trains this adapter, if any.
        state_dict: the model's whole state dictionary where the model itself holds only a part (sharded).
        training_state: also write what resuming needs.
        more: names of base parameters to write, too, and their names in the file; see `embedding_keys`.

    Raises:
        OSError: it can't be written; what was there before is untouched.
    """
    state = plain_state(model.state_dict() if state_dict is None else state_dict)
    kept = controller.kept_triplets(state) if controller else {}
    tensors = adapter_tensors(model, adapter, config, state, kept)
    tensors |= {PREFIX + name: _portable(state[key]) for key, name in (more or {}).items()}
    saved_config = _config_to_save(config, controller, kept)

    def write(temporary: Path) -> None:
        write_tensor_file(temporary / WEIGHTS_NAME, tensors)
        saved_config.save_pretrained(temporary)
        if controller:
            controller.history.save(temporary / HISTORY_NAME)
        if training_state:
            own = {name: _portable(state[key]) for key, name in training_keys(model, adapter).items()}
            write_tensor_file(temporary / TRAINING_STATE_NAME, own)

    write_folder(folder, write, owned=OWNED)


def adapter_tensors(
    model: nn.Module,
    adapter: str,
    config: LoraConfig,
    state: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors of an adapter under PEFT's names, cut to the ``kept`` triplets."""
    tensors: dict[str, Tensor] = {}
    layers = adapter_layers(model, adapter)
    adalora = isinstance(config, AdaLoraConfig)
    for path, layer in layers.items():
        for key in layer.adapter_parameters(adapter):
            tensor = _portable(state[f"{path}.{key}.{adapter}"])
            if path in kept:
                tensor = tensor[:, kept[path]] if key == "lora_B" else tensor[kept[path]]
            tensors[_file_key(layer, path, key, adalora)] = _file_shape(
                layer, key, tensor, adalora
            ).contiguous()
    for path, module in saved_modules(model).items():
        inside = f"{path}.modules_to_save.{adapter}."
        for name in module.modules_to_save[adapter].state_dict() if adapter in module.modules_to_save else ():
            tensors[f"{PREFIX}{path}.{name}"] = _portable(state[inside + name])
    for name in map(plain_name, bias_names(model, config.bias, list(layers), list(saved_modules(model)))):
        module_path = name.rpartition(".")[0]
        file_name = f"{module_path}.base_layer.bias" if module_path in layers else name
        tensors[PREFIX + file_name] = _portable(state[name])
    return tensors


def embedding_keys(model: nn.Module, adapter: str, save: bool | str) -> dict[str, str]:
    """The base parameters of input and output embeddings that belong in an adapter's file, and their names there.

    Args:
        model: the adapted model; none if it is not one of Transformers'.
        adapter: one of its adapters.
        save: True for all embeddings, "auto" for those that the adapter adapts, or False.
    """
    if save not in (True, False, "auto"):
        raise ValueError(f"`save_embedding_layers` must be True, False or 'auto', but is {save!r}.")
    getters = [getattr(model, f"get_{kind}_embeddings", None) for kind in ("input", "output")]
    embeddings = [getter() for getter in getters if callable(getter)] if save else []
    layers, keys = adapter_layers(model, adapter), {}
    for path, module in own_modules(model).items():
        adapted = plain_name(path) in layers
        if any(module is each for each in embeddings) and (adapted or save is True):
            for name, _ in module.named_parameters(recurse=False):
                inner = f"base_layer.{name}" if adapted else name
                keys[plain_name(f"{path}.{name}")] = plain_name(f"{path}.{inner}")
    return keys


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dictionary with `plain_name` for every key."""
    return {plain_name(key): value for key, value in state.items()}


def training_keys(model: nn.Module, adapter: str) -> dict[str, str]:
    """Keys of the model's `plain_state` that belong to the adapter's training, and their names in a file.

    All that trains, whether it is the adapter's own or not, and what else changes in training. In the file the
    adapter's own keys are without its name, so that a run can go on under another one.
    """
    own = {f"{path}.{key}.{adapter}": f"{path}.{key}" for path, layer in adapter_layers(model, adapter).items()
           for key in layer.adapter_parameters(adapter)}  # fmt: skip
    heads = tuple(f"{path}.modules_to_save.{adapter}." for path in saved_modules(model))
    others = {*BUFFERS, _EXTRA, *_trained_beside(model)}
    names = {}
    for key in plain_state(model.state_dict()):
        if heads and key.startswith(heads):
            names[key] = key.replace(f".modules_to_save.{adapter}.", ".modules_to_save.", 1)
        elif key in own or key in others:
            names[key] = own.get(key, key)
    return names


def _trained_beside(model: nn.Module) -> Iterator[str]:
    """Names of all parameters that train, and of statistics that batch normalization gathers in training."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name)
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and ".modules_to_save." not in f".{path}.":
            for name, _ in module.named_buffers(recurse=False):
                yield plain_name(f"{path}.{name}" if path else name)


def trains_more(model: Any, adapter: str) -> bool:
    """Whether training changes more of the model than the adapter's own file holds."""
    biases = bias_names(
        model,
        model.peft_config[adapter].bias,
        list(adapter_layers(model, adapter)),
        list(saved_modules(model)),
    )
    held = {*map(plain_name, biases), *BUFFERS, _EXTRA}
    return any(key == name and key not in held for key, name in training_keys(model, adapter).items())


def gathered_state(model: nn.Module, adapter: str, bias: str, more: Iterable[str] = ()) -> dict[str, Any]:
    """What `write_adapter` needs of a sharded model's state dictionary, whole; all processes must call it together."""
    biases = bias_names(model, bias, list(adapter_layers(model, adapter)), list(saved_modules(model)))
    keys = list(dict.fromkeys([*training_keys(model, adapter), *map(plain_name, biases), *more]))
    with zero.whole(p for name, p in model.named_parameters() if plain_name(name) in keys):
        state = plain_state(model.state_dict())
        tensors = [key for key in keys if isinstance(state[key], Tensor)]
        whole = [tensor.to("cpu", copy=True) for tensor in gather([state[key] for key in tensors])]
    return {**{key: state[key] for key in keys}, **dict(zip(tensors, whole, strict=True))}


def prepare_training_state(
    model: nn.Module, adapter: str, file: AdapterFile, controller: Controller | None
) -> Callable[[], None]:
    """Check that an attached adapter can go on with the run whose state is in a folder.

    Returns:
        What brings the adapter to this state.

    Raises:
        ValueError: it is broken, or of another run.
    """
    tensors, source = file.training or {}, file.training_source
    _fit_all(model, file, file.config)
    own = plain_state(model.state_dict())
    names = training_keys(model, adapter)
    parameters = {plain_name(name) for name, _ in model.named_parameters()}
    for name in sorted(set(names.values()) ^ set(tensors)):
        if name in parameters:
            raise ValueError(
                f"{source}: {name!r} trains {'in that run, but is frozen here' if name in tensors else 'here only'}. "
                "Set its `requires_grad` as in that run."
            )
        raise ValueError(f"{source}: only {'the file' if name in tensors else 'the model'} has {name!r}.")
    for key, name in sorted(names.items(), key=lambda item: item[0] in BUFFERS):
        if key != _EXTRA:
            _check_like(source, name, tensors[name], own[key])
            if key in parameters or key in BUFFERS:  # any other buffer may hold infinities, such as a mask
                check_finite(source, name, tensors[name])
    if controller is not None:
        try:
            controller.check_packed_state(tensors[_EXTRA])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    keys = {plain_name(key): key for key in model.state_dict()}

    def load() -> None:
        laid_out = _laid_out({key: tensors[name] for key, name in names.items()}, own)
        model.load_state_dict({keys[key]: tensor for key, tensor in laid_out.items()}, strict=False)

    return load


def _check_like(source: str, name: str, tensor: Tensor, own: Tensor) -> None:
    if tensor.shape != own.shape:
        raise ValueError(f"{source}: {name} is {tuple(tensor.shape)}, but here {tuple(own.shape)}.")
    if tensor.dtype != own.dtype:
        raise ValueError(
            f"{source}: {name} is {tensor.dtype}, but here {own.dtype}. Load the base model in the dtype of that run."
        )


def _config_to_save(
    config: LoraConfig, controller: Controller | None, kept: Mapping[str, Tensor]
) -> LoraConfig:
    if not isinstance(config, AdaLoraConfig):
        return replace(config, inference_mode=True)
    schedule = controller.schedule if controller else None
    changes: dict[str, Any] = {"inference_mode": True}
    if schedule:
        changes |= {"tinit": schedule.tinit, "tfinal": schedule.tfinal, "total_step": schedule.total_step}
    elif config.total_step is None:  # PEFT takes no adapter without a schedule
        changes |= {"tinit": 0, "tfinal": 0, "total_step": NO_SCHEDULE}
    if controller:
        spare = {path: [False] * (config.init_r - len(mask)) for path, mask in kept.items()}
        pruned = any(spare[path] or not mask.all() for path, mask in kept.items())
        pattern = {f"{path}.lora_E": mask.tolist() + spare[path] for path, mask in kept.items()}
        changes["rank_pattern"] = pattern if pruned else None  # PEFT warns about every pattern that it reads
    return replace(config, **changes)


def _file_key(layer: nn.Module, path: str, key: str, adalora: bool) -> str:
    if isinstance(layer, nn.Embedding) and key != "lora_E":
        return f"{PREFIX}{path}.{key.replace('lora_', 'lora_embedding_')}"
    return f"{PREFIX}{path}.{key}" if adalora else f"{PREFIX}{path}.{key}.weight"


def _file_shape(layer: nn.Module, key: str, tensor: Tensor, adalora: bool) -> Tensor:
    if not isinstance(layer, nn.Conv2d) or adalora:
        return tensor
    return tensor.view(tensor.shape[0], -1, *(layer.kernel_size if key == "lora_A" else (1, 1)))


def _portable(value: Tensor | str) -> Tensor:
    if isinstance(value, str):  # the extra state of a sharded model
        return torch.tensor(json.loads(value), dtype=torch.int64)
    return gather([value])[0].detach().cpu().clone()
