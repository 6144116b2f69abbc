"""Writing an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters import AdapterLayer, ParameterSlot
from rankwise.attach.attachment import (
    adapter_layers,
    bias_names,
    plain_name,
    plain_state,
    saved_modules,
)
from rankwise.attach.parameters import in_model_order
from rankwise.attach.targets import (
    own_modules,
)
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.files.atomic import write_folder
from rankwise.files.tensors import write_tensor_file
from rankwise.parallel import zero
from rankwise.parallel.sharded import gather
from rankwise.run.controller import Controller
from rankwise.storage.names import (
    HISTORY_NAME,
    NO_SCHEDULE,
    OWNED,
    PICKLE_NAME,
    PREFIX,
    TRAINING_STATE_NAME,
    WEIGHTS_NAME,
)
from rankwise.storage.nesting import nested_paths
from rankwise.storage.read import AdapterFile, sort_tensors
from rankwise.storage.training import training_keys


def write_adapter(
    folder: Path,
    model: nn.Module,
    adapter: str,
    config: LoraConfig,
    controller: Controller | None,
    state: Mapping[str, Any],
    training_state: bool = False,
    more: Mapping[str, str] | None = None,
    as_pickle: bool = False,
) -> None:
    """Write an adapter folder, all or nothing.

    Args:
        folder: made if need be; files of others in it stay.
        model: the adapted model.
        adapter: which of its adapters.
        config: the adapter's configuration.
        controller: the one that trains this adapter, if any.
        state: the model's `plain_state`, whole, where the model itself may hold only a part (sharded).
        training_state: also write what resuming needs.
        more: names of base parameters to write, too, and their names in the file; see `embedding_keys`.
        as_pickle: write the adapter's tensors as PyTorch's pickle instead of safetensors.

    Raises:
        OSError: it can't be written; what was there before is untouched.
    """
    kept = controller.kept_triplets(state) if controller else {}
    layers = adapter_layers(model, adapter)
    tensors = adapter_tensors(model, adapter, config, layers, state, kept)
    tensors |= {PREFIX + name: portable(state[key]) for key, name in (more or {}).items()}
    saved_config = config_to_save(config, controller, kept, layers)
    if config.target_parameters:
        slots = [path for path, layer in layers.items() if isinstance(layer, ParameterSlot)]
        saved_config = replace(
            saved_config, target_parameters=in_model_order(config.target_parameters, slots)
        )

    def write(temporary: Path) -> None:
        if as_pickle:
            torch.save(tensors, temporary / PICKLE_NAME)
        else:
            write_tensor_file(temporary / WEIGHTS_NAME, tensors)
        saved_config.save_pretrained(temporary)
        if controller:
            controller.history.save(temporary / HISTORY_NAME)
        if training_state:
            own = {name: portable(state[key]) for key, name in training_keys(model, adapter).items()}
            write_tensor_file(temporary / TRAINING_STATE_NAME, own)

    write_folder(folder, write, owned=OWNED)


def adapter_tensors(
    model: nn.Module,
    adapter: str,
    config: LoraConfig,
    layers: Mapping[str, AdapterLayer],
    state: Mapping[str, Any],
    kept: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors of an adapter on ``layers`` under PEFT's names, cut to the ``kept`` triplets."""
    tensors: dict[str, Tensor] = {}
    adalora = isinstance(config, AdaLoraConfig)
    names = (
        {} if adalora else nested_paths(p for p, each in layers.items() if isinstance(each, ParameterSlot))
    )
    for path, layer in layers.items():
        stays = kept[path] if path in kept else layer.kept_of_stack(adapter) if adalora else None
        places = None if stays is None or bool(stays.all()) else stays.nonzero().flatten()
        for key in layer.adapter_parameters(adapter):
            factor = key.removeprefix("lora_")
            tensor = _whole(state[f"{path}.{key}.{adapter}"])
            tensor = tensor.clone() if places is None else tensor.index_select(int(factor == "B"), places)
            name = PREFIX + layer.file_name(names.get(path, path), factor, adalora)
            tensors[name] = layer.to_file(factor, tensor, adalora).contiguous()
    heads = saved_modules(model)
    for path, module in heads.items():
        inside = f"{path}.modules_to_save.{adapter}."
        for name in module.modules_to_save[adapter].state_dict() if adapter in module.modules_to_save else ():
            tensors[f"{PREFIX}{path}.{name}"] = portable(state[inside + name])
    for name in map(plain_name, bias_names(model, config.bias, list(layers), list(heads))):
        module_path = name.rpartition(".")[0]
        file_name = f"{module_path}.base_layer.bias" if module_path in layers else name
        tensors[PREFIX + file_name] = portable(state[name])
    return tensors


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
    layers = adapter_layers(model, adapter)
    tensors = adapter_tensors(model, adapter, config, layers, state, kept)
    config = config_to_save(config, controller, kept, layers)
    return sort_tensors(f"The adapter {adapter!r}", config, tensors)


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
    if save is not True:
        embeddings = [each for each in embeddings if _adapts(each, adapter)]
    keys: dict[str, str] = {}
    for path, module in own_modules(model).items() if embeddings else ():
        adapted = _adapts(module, adapter)
        if any(module is each for each in embeddings):
            for name, _ in module.named_parameters(recurse=False):
                inner = f"base_layer.{name}" if adapted else name
                keys[plain_name(f"{path}.{name}")] = plain_name(f"{path}.{inner}")
    return keys


def _adapts(module: Any, adapter: str) -> bool:
    return isinstance(module, AdapterLayer) and adapter in module.lora_A


def gathered_state(model: nn.Module, adapter: str, bias: str, more: Iterable[str] = ()) -> dict[str, Any]:
    """What `write_adapter` needs of a sharded model's state dictionary, whole; all processes must call it together."""
    biases = bias_names(model, bias, list(adapter_layers(model, adapter)), list(saved_modules(model)))
    keys = list(dict.fromkeys([*training_keys(model, adapter), *map(plain_name, biases), *more]))
    with zero.whole(p for name, p in model.named_parameters() if plain_name(name) in keys):
        state = plain_state(model.state_dict())
        tensors = [key for key in keys if isinstance(state[key], Tensor)]
        whole = [tensor.to("cpu", copy=True) for tensor in gather([state[key] for key in tensors])]
    return {**{key: state[key] for key in keys}, **dict(zip(tensors, whole, strict=True))}


def config_to_save(
    config: LoraConfig,
    controller: Controller | None,
    kept: Mapping[str, Tensor],
    layers: Mapping[str, AdapterLayer],
) -> LoraConfig:
    """The configuration that belongs to an adapter's tensors, cut to the ``kept`` triplets."""
    if not isinstance(config, AdaLoraConfig):
        return replace(config, inference_mode=True)
    schedule = controller.schedule if controller else None
    changes: dict[str, Any] = {"inference_mode": True}
    if schedule:
        changes |= {"tinit": schedule.tinit, "tfinal": schedule.tfinal, "total_step": schedule.total_step}
    elif config.total_step is None:  # PEFT takes no adapter without a schedule
        changes |= {"tinit": 0, "tfinal": 0, "total_step": NO_SCHEDULE}
    if controller:
        pattern = {
            f"{path}.lora_E": _filled_up(mask, layers[path].blocks(layers[path]), config.init_r)
            for path, mask in kept.items()
        }
        pruned = not all(map(all, pattern.values()))
        # PEFT warns about every pattern that it reads; it reads none of an adapter of parameters.
        changes["rank_pattern"] = pattern if pruned or config.target_parameters else None
    return replace(config, **changes)


def _filled_up(mask: Tensor, blocks: int, init_r: int) -> list[bool]:
    """A layer's mask as a file has it: ``init_r`` booleans for each block, however many ranks are held."""
    rows: list[list[bool]] = mask.view(blocks, -1).tolist()
    return [each for row in rows for each in (*row, *[False] * (init_r - len(row)))]


def portable(value: Tensor | str) -> Tensor:
    """An entry of a state dictionary as a file has it: whole, on the CPU, sharing memory with nothing."""
    if isinstance(value, str):  # the extra state of a sharded model
        return torch.tensor(json.loads(value), dtype=torch.int64)
    return _whole(value).clone()


def _whole(tensor: Any) -> Tensor:
    return gather([tensor])[0].detach().cpu()
