"""Adapter folders in PEFT's format, and what resuming needs beside them.

    adapter_config.json            the configuration, in PEFT's spelling
    adapter_model.safetensors      the factors, cut to the triplets that stay
    rank_history.json              budget and ranks over the run (AdaLoRA)
    training_state.safetensors     uncut factors, scores, masks and step of an unfinished run; not for sharing

Loading runs no code from a folder: tensors come from safetensors, or from ``adapter_model.bin`` with
``weights_only=True``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankwise.adapters import AdapterLayer, adapters_for
from rankwise.atomic import recover, write_folder
from rankwise.attach import (
    Attachment,
    Factors,
    adapter_layers,
    base_scaling,
    bias_names,
    check_adapter_name,
    factor_options,
    saved_modules,
)
from rankwise.config import CONFIG_NAME, AdaLoraConfig, LoraConfig
from rankwise.controller import BUFFERS, Controller
from rankwise.history import RankHistory
from rankwise.suggest import nearest
from rankwise.targets import pattern_value

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
HISTORY_NAME = "rank_history.json"
TRAINING_STATE_NAME = "training_state.safetensors"
OWNED = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, HISTORY_NAME, TRAINING_STATE_NAME)
PREFIX = "base_model.model."

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<factor>[ABE])(?:\.weight)?")


@dataclass
class AdapterFile:
    """The content of an adapter folder, checked as far as that goes without a model."""

    source: str
    config: LoraConfig
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> {"A": …, "B": …, "E": …}
    others: dict[str, Tensor] = field(default_factory=dict)  # biases and modules saved whole
    history: RankHistory | None = None


# Reading.


def read_adapter(folder: Path) -> AdapterFile:
    """Read an adapter folder.

    Raises:
        FileNotFoundError: it is no adapter folder.
        TypeError, ValueError: a file is broken or does not fit the others; the message names it.
    """
    recover(folder)
    config = LoraConfig.from_pretrained(folder)
    tensors, source = _read_tensors(folder)
    file = AdapterFile(source, config)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(name):
            file.factors.setdefault(match["path"], {})[match["factor"]] = tensor
        else:
            file.others[name] = tensor
    _check_factors(file)
    if (folder / HISTORY_NAME).is_file():
        file.history = RankHistory.load(folder / HISTORY_NAME)
    return file


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: it is empty, cut off or not such a file.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} can't be read as safetensors ({error}). It is empty, cut off or another kind of file: copy it "
            "again, or use an earlier checkpoint."
        ) from None
    return tensors


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    if (folder / WEIGHTS_NAME).is_file():
        return read_tensor_file(folder / WEIGHTS_NAME), str(folder / WEIGHTS_NAME)
    path = folder / PICKLE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {WEIGHTS_NAME}, so it is not a whole adapter.")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken pickle raises
        raise ValueError(f"{path} can't be read as a file of tensors only ({error}).") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors.")
    return tensors, str(path)


def _check_factors(file: AdapterFile) -> None:
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
    if adalora:
        _check_rank_pattern(file)


def _check_rank_pattern(file: AdapterFile) -> None:
    config: AdaLoraConfig = file.config  # type: ignore[assignment]
    pattern = {
        key.removesuffix(".lora_E").removeprefix(PREFIX): kept
        for key, kept in (config.rank_pattern or {}).items()
    }
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
    config = replace(file.config, inference_mode=not trainable)
    layers, heads, rest = _fit_all(model, file, config)
    return Attachment(adapter, config, layers, heads, rest)  # type: ignore[arg-type]


def load_values(model: nn.Module, adapter: str, file: AdapterFile, controller: Controller | None) -> None:
    """Bring an attached adapter to the values in a file; its choice of ranks becomes the file's.

    Raises:
        ValueError: it belongs to another adapter; the model is then as before.
    """
    layers, heads, rest = _fit_all(model, file, file.config)
    own = adapter_layers(model, adapter)
    for path in own.keys() ^ layers.keys():
        where = "the model" if path in own else file.source
        raise ValueError(f"{file.source}: only {where} adapts {path!r}; this is another adapter.")
    kept = {path: _places(own[path], adapter, path, factors, file) for path, factors in layers.items()}
    with torch.no_grad():
        for path, factors in layers.items():
            parameters = own[path].adapter_parameters(adapter)
            for key, value in (("lora_A", factors.A), ("lora_E", factors.E), ("lora_B", factors.B)):
                if value is not None:
                    target = parameters[key].data
                    target.zero_()
                    (target.T if key == "lora_B" else target)[kept[path]] = (
                        value.T if key == "lora_B" else value
                    )
        for path, tensors in heads.items():
            saved_modules(model)[path].modules_to_save[adapter].load_state_dict(tensors)
        for name, value in rest.items():
            model.get_parameter(name).copy_(value)
    if controller is not None:
        controller.take_over(kept)


def _places(layer: AdapterLayer, adapter: str, path: str, factors: Factors, file: AdapterFile) -> Tensor:
    """(r,) bool: which of the attached triplets the file's triplets are."""
    held, rank = layer.lora_A[adapter].shape[0], factors.A.shape[0]
    places = torch.zeros(held, dtype=torch.bool)
    pattern = file.config.rank_pattern or {} if isinstance(file.config, AdaLoraConfig) else {}
    listed = pattern.get(f"{path}.lora_E")
    if listed is not None and rank < held:
        places[: len(listed)] = torch.tensor(listed[:held], dtype=torch.bool)
    else:
        places[:rank] = True
    if rank > held or int(places.sum()) != rank:
        raise ValueError(
            f"{file.source}: {path!r} has rank {rank}, more than the {held} of the attached adapter."
        )
    return places


def _fit_all(
    model: nn.Module, file: AdapterFile, config: LoraConfig
) -> tuple[dict[str, Factors], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Layers, modules saved whole and single parameters of the file, all checked to fit the model."""
    modules = dict(model.named_modules())
    layers = {path: _fit(modules, path, factors, config, file) for path, factors in file.factors.items()}
    heads: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in file.others.items():
        path = _head_of(name, config, modules)
        if path is None:
            rest[name.replace(".base_layer.", ".")] = tensor
        else:
            heads.setdefault(path, {})[name.removeprefix(f"{path}.")] = tensor
    for path, tensors in heads.items():
        _fit_head(modules[path], path, tensors, file)
    own = dict(model.named_parameters())
    for name, tensor in rest.items():
        if name not in own:
            raise ValueError(f"{file.source}: the model has no {name!r}.{nearest(name, own)}")
        if own[name].shape != tensor.shape:
            raise ValueError(_shape_message(file, name, tensor, own[name].shape))
    return layers, heads, rest


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
            f"{file.source} adapts {path!r}, which the model does not have.{nearest(path, modules)} "
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
    options = factor_options(layer)
    E = factors["E"].to(**options) if adalora else None
    return Factors(A.to(**options), B.to(**options), E, base_scaling(config, path, rank))


def _shape_message(file: AdapterFile, name: str, tensor: Tensor, shape: Iterable[int]) -> str:
    return (
        f"{file.source}: {name} is {tuple(tensor.shape)}, but this model takes {tuple(shape)}. The adapter belongs "
        "to a model of other shapes: load the base model that it was trained on."
    )


def _head_of(name: str, config: LoraConfig, modules: Mapping[str, nn.Module]) -> str | None:
    """The module in `modules_to_save` that the tensor ``name`` belongs to."""
    for wanted in config.modules_to_save or ():
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            path = ".".join(parts[:end])
            if path in modules and (path == wanted or path.endswith(f".{wanted}")):
                return path
    return None


def _fit_head(module: nn.Module, path: str, tensors: Mapping[str, Tensor], file: AdapterFile) -> None:
    own = _plain_state(module)
    for key in own.keys() ^ tensors.keys():
        where = "the model" if key in own else file.source
        raise ValueError(
            f"{file.source}: only {where} has {path}.{key}; the adapter belongs to another model."
        )
    for key, tensor in tensors.items():
        if own[key].shape != tensor.shape:
            raise ValueError(_shape_message(file, f"{path}.{key}", tensor, own[key].shape))


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

    Raises:
        OSError: it can't be written; what was there before is untouched.
    """
    state = dict(model.state_dict()) if state_dict is None else dict(state_dict)
    kept = controller.kept_triplets() if controller else {}
    tensors = adapter_tensors(model, adapter, config, state, kept)
    saved_config = _config_to_save(config, controller, kept)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        saved_config.save_pretrained(temporary)
        if controller:
            controller.history.save(temporary / HISTORY_NAME)
        if training_state:
            own = {key: _portable(state[key]) for key in training_keys(model, adapter)}
            save_file(own, temporary / TRAINING_STATE_NAME, metadata={"format": "pt"})

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
    for name in bias_names(model, config.bias, list(layers), list(saved_modules(model))):
        module_path = name.rpartition(".")[0]
        file_name = f"{module_path}.base_layer.bias" if module_path in layers else name
        tensors[PREFIX + file_name] = _portable(state[name])
    return tensors


def training_keys(model: nn.Module, adapter: str) -> list[str]:
    """Keys of the model's state dictionary that belong to the adapter's training."""
    own = {f"{path}.{key}.{adapter}" for path, layer in adapter_layers(model, adapter).items()
           for key in layer.adapter_parameters(adapter)}  # fmt: skip
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = tuple(f"{path}.modules_to_save.{adapter}." for path in saved_modules(model))
    return [
        key
        for key in model.state_dict()
        if key in own
        or key in trained
        or key in BUFFERS
        or key == "_extra_state"
        or (heads and key.startswith(heads))
    ]


def load_training_state(model: nn.Module, adapter: str, path: Path) -> None:
    """Bring an attached adapter to the state in ``path``, a `TRAINING_STATE_NAME` file.

    Raises:
        ValueError: it is broken or belongs to another adapter; the model is then as before.
    """
    tensors = read_tensor_file(path)
    own = model.state_dict()
    expected = training_keys(model, adapter)
    for key in sorted(set(expected) ^ set(tensors)):
        raise ValueError(
            f"{path}: only {'the model' if key in own else 'the file'} has {key!r}; they don't fit."
        )
    for key in expected:
        if key != "_extra_state" and own[key].shape != tensors[key].shape:
            raise ValueError(f"{path}: {key} is {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}.")
    model.load_state_dict(tensors, strict=False)


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
        changes |= {"tinit": 0, "tfinal": 0, "total_step": 1}
    if controller:
        spare = {path: [False] * (config.init_r - len(mask)) for path, mask in kept.items()}
        changes["rank_pattern"] = {
            f"{path}.lora_E": mask.tolist() + spare[path] for path, mask in kept.items()
        }
    return replace(config, **changes)


def _file_key(layer: nn.Module, path: str, key: str, adalora: bool) -> str:
    if isinstance(layer, nn.Embedding) and key != "lora_E":
        return f"{PREFIX}{path}.{key.replace('lora_', 'lora_embedding_')}"
    return f"{PREFIX}{path}.{key}" if adalora else f"{PREFIX}{path}.{key}.weight"


def _file_shape(layer: nn.Module, key: str, tensor: Tensor, adalora: bool) -> Tensor:
    if not isinstance(layer, nn.Conv2d) or adalora:
        return tensor
    return tensor.view(tensor.shape[0], -1, *(layer.kernel_size if key == "lora_A" else (1, 1)))


def _portable(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().clone()
