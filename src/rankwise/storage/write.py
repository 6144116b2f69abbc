"""Writes adapter folders."""

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
from rankwise.attach.targets import own_modules
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.files.atomic import write_folder
from rankwise.files.tensors import write_tensor_file
from rankwise.parallel import zero
from rankwise.parallel.sharded import gather
from rankwise.run.controller import Controller
from rankwise.run.history import RankHistory
from rankwise.run.own import kept_ranks
from rankwise.storage.adapter_file import AdapterFile, sort_tensors, without_E
from rankwise.storage.contents import named_by_use
from rankwise.storage.finite import refuse_broken
from rankwise.storage.lora_layout import Update, plain_lora, with_a_rank
from rankwise.storage.names import (
    HISTORY_NAME,
    NO_SCHEDULE,
    OWNED,
    PICKLE_NAME,
    PREFIX,
    TRAINING_CONFIG_NAME,
    TRAINING_STATE_NAME,
    WEIGHTS_NAME,
)
from rankwise.storage.nesting import nested_paths
from rankwise.storage.run_config import write_run_config
from rankwise.storage.training import factor_keys, training_keys


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
    history: RankHistory | None = None,
) -> None:
    """Write an adapter folder, atomically.

    Args:
        folder: the folder to write. It is created if it does not exist. Other files in it are kept.
        model: the adapted model.
        adapter: the adapter's name.
        config: the adapter's configuration.
        controller: the controller that trains this adapter, if there is one.
        state: the model's `plain_state`, complete even if the model itself holds only a shard.
        training_state: whether to write the state for resuming as well.
        more: the names of base parameters to write as well, with their names in the file; see
            `rankwise.storage.embeddings`.
        as_pickle: whether to write the adapter's tensors as PyTorch's pickle instead of safetensors.
        history: the history of an adapter that was loaded and has no controller.

    Raises:
        OSError: the folder can't be written. Its previous contents are then unchanged.
        ValueError: a tensor holds NaN or infinite values. Nothing is written then.
    """
    # Checked before the conversion to LoRA, whose own message for such values says less.
    factors = {name: state[key] for key, name in factor_keys(model, adapter).items() if key in state}
    refuse_broken(folder, model, adapter, factors)
    saved_config, tensors = adapter_content(model, adapter, config, controller, state)
    tensors |= {PREFIX + name: portable(state[key]) for key, name in (more or {}).items()}
    tensors = named_by_use(tensors)

    keys = training_keys(model, adapter) if training_state else {}
    own = {name: portable(state[key]) for key, name in keys.items()}
    others = {name: each for name, each in own.items() if name not in factors}
    refuse_broken(folder, model, adapter, {**others, **tensors})

    if controller:
        history = controller.history

    def write(temporary: Path) -> None:
        if as_pickle:
            torch.save(tensors, temporary / PICKLE_NAME)
        else:
            write_tensor_file(temporary / WEIGHTS_NAME, tensors)
        saved_config.save_pretrained(temporary)
        if history is not None:
            history.save(temporary / HISTORY_NAME)
        if training_state:
            write_tensor_file(temporary / TRAINING_STATE_NAME, own)
        if controller and without_E(config):
            run_config = _with_schedule(controller.config, controller)
            state_of_run = own if training_state else None
            write_run_config(temporary / TRAINING_CONFIG_NAME, run_config, tensors, state_of_run)

    write_folder(folder, write, owned=OWNED)


def adapter_content(
    model: nn.Module,
    adapter: str,
    config: LoraConfig,
    controller: Controller | None,
    state: Mapping[str, Any],
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter's folder. For the arguments, see `write_adapter`."""
    kept = kept_ranks(controller, state) if controller else {}
    layers = adapter_layers(model, adapter)
    if without_E(config):
        saved, tensors = _plain_lora(model, adapter, config, layers, state, kept)
    else:
        saved = config_to_save(config, controller, kept, layers)
        tensors = _factors(adapter, config, layers, state, kept)
    return saved, named_by_use({**tensors, **_others(model, adapter, config, list(layers), state)})


def _plain_lora(
    model: nn.Module,
    adapter: str,
    config: LoraConfig,
    layers: Mapping[str, AdapterLayer],
    state: Mapping[str, Any],
    kept: Mapping[str, Tensor],
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the factors of an adapter written as plain LoRA, with the ``kept`` ranks."""
    acting = with_a_rank(
        {path: _kept_matrices(path, layer, adapter, state, kept.get(path)) for path, layer in layers.items()}
    )
    stacks = {path: own for path, own in acting.items() if isinstance(layers[path], ParameterSlot)}
    plain = {path: _as_lora(layers[path], *own) for path, own in acting.items() if path not in stacks}
    left_out = layers.keys() - plain.keys() - stacks.keys()
    modules = list(map(plain_name, own_modules(model))) if left_out else ()
    if config.target_parameters:
        config = replace(config, target_parameters=_own_parameters(config, layers))
    return plain_lora(config, plain, stacks, left_out, modules)


def _kept_matrices(
    path: str, layer: AdapterLayer, adapter: str, state: Mapping[str, Any], kept: Tensor | None
) -> list[Update]:
    """The ``kept`` ranks, (ranks,), bool, of each matrix in a layer; if None, the ranks that the layer uses."""
    A, B = (_whole(state[f"{path}.lora_{key}.{adapter}"]) for key in "AB")
    if kept is None:
        kept = torch.zeros(len(A), dtype=torch.bool, device="cpu")
        acting = layer.kept.get(adapter, len(A))
        kept[slice(acting) if isinstance(acting, int) else acting.cpu()] = True
    kernel = tuple(getattr(layer, "kernel_size", ()))
    parts = (part.tensor_split(layer.blocks(layer), dim) for part, dim in ((A, 0), (B, 1), (kept, 0)))
    return [
        Update(own_A[own], own_B[:, own], type(layer), kernel, layer.scaling[adapter])
        for own_A, own_B, own in zip(*parts, strict=True)
    ]


def _as_lora(layer: AdapterLayer, update: Update) -> Update:
    A, B = layer.as_lora(layer, update.A, update.B)
    return replace(update, A=A, B=B)


def _factors(
    adapter: str,
    config: LoraConfig,
    layers: Mapping[str, AdapterLayer],
    state: Mapping[str, Any],
    kept: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The factors of ``layers`` under PEFT's names, cut to the ``kept`` triplets."""
    tensors: dict[str, Tensor] = {}
    adalora = isinstance(config, AdaLoraConfig)
    slots = (path for path, layer in layers.items() if isinstance(layer, ParameterSlot))
    names = {} if adalora else nested_paths(slots)
    for path, layer in layers.items():
        stays = kept[path] if path in kept else layer.kept_ranks_of_stack(adapter) if adalora else None
        places = None if stays is None or bool(stays.all()) else stays.nonzero().flatten()
        for key in layer.adapter_parameters(adapter):
            factor = key.removeprefix("lora_")
            tensor = _whole(state[f"{path}.{key}.{adapter}"])
            tensor = tensor.clone() if places is None else tensor.index_select(int(factor == "B"), places)
            name = PREFIX + layer.file_name(names.get(path, path), factor, adalora)
            tensors[name] = layer.to_file(factor, tensor, adalora).contiguous()
    return tensors


def _others(
    model: nn.Module, adapter: str, config: LoraConfig, layers: list[str], state: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of modules saved in full, and of biases."""
    tensors: dict[str, Tensor] = {}
    heads = saved_modules(model)
    for path, module in heads.items():
        inside = f"{path}.modules_to_save.{adapter}."
        for name in module.modules_to_save[adapter].state_dict() if adapter in module.modules_to_save else ():
            tensors[f"{PREFIX}{path}.{name}"] = portable(state[inside + name])
    for name in map(plain_name, bias_names(model, config.bias, layers, list(heads))):
        module_path = name.rpartition(".")[0]
        file_name = f"{module_path}.base_layer.bias" if module_path in layers else name
        tensors[PREFIX + file_name] = portable(state[name])
    return tensors


def read_model_adapter(model: Any, adapter: str) -> AdapterFile:
    """The result that `read_adapter` would give for an adapter of ``model`` that has just been saved.

    Raises:
        TypeError: ``model`` is no `rankwise.PeftModel`.
        ValueError: the model has no such adapter.
    """
    if not hasattr(model, "_controller_of"):
        raise TypeError(
            "An adapter is a folder, or a model of `rankwise.get_peft_model` or `rankwise.PeftModel`, but this is a "
            f"{type(model).__name__}. Save a model of PEFT with `model.save_pretrained(folder)`, and give the folder."
        )
    if adapter not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter!r}; the model has {sorted(model.peft_config)}.")
    config, controller = model.peft_config[adapter], model._controller_of(adapter)
    saved, tensors = adapter_content(model, adapter, config, controller, plain_state(model.state_dict()))
    return sort_tensors(f"The adapter {adapter!r}", saved, tensors)


def gathered_state(model: nn.Module, adapter: str, bias: str, more: Iterable[str] = ()) -> dict[str, Any]:
    """Gather the entries of a sharded model's state that `write_adapter` needs. All processes must call it together."""
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
    """The configuration for an adapter's tensors, cut to the ``kept`` triplets."""
    changes: dict[str, Any] = {"inference_mode": True}
    if config.target_parameters:
        changes["target_parameters"] = _own_parameters(config, layers)
    if not isinstance(config, AdaLoraConfig):
        return replace(config, **changes)
    config = _with_schedule(config, controller)
    if config.total_step is None:  # PEFT rejects an adapter without a schedule
        changes |= {"tinit": 0, "tfinal": 0, "total_step": NO_SCHEDULE}
    if controller:
        pattern = {
            f"{path}.lora_E": _filled_up(mask, layers[path].blocks(layers[path]), config.init_r)
            for path, mask in kept.items()
        }
        pruned = not all(map(all, pattern.values()))
        # PEFT warns about every pattern that it reads. It reads none from an adapter of parameters.
        changes["rank_pattern"] = pattern if pruned or config.target_parameters else None
    return replace(config, **changes)


def _own_parameters(config: LoraConfig, layers: Mapping[str, AdapterLayer]) -> list[str]:
    """The configuration's ``target_parameters``, in the model's order."""
    slots = [path for path, layer in layers.items() if isinstance(layer, ParameterSlot)]
    return in_model_order(config.target_parameters or [], slots)


def _with_schedule(config: AdaLoraConfig, controller: Controller | None) -> AdaLoraConfig:
    """The configuration with the schedule that the run follows, if the run's length is known."""
    plan = controller.schedule if controller else None
    if plan is None:
        return config
    return replace(config, tinit=plan.tinit, tfinal=plan.tfinal, total_step=plan.total_step)


def _filled_up(mask: Tensor, blocks: int, init_r: int) -> list[bool]:
    """A layer's mask in a file's layout: ``init_r`` booleans for each block, however many ranks it holds."""
    rows: list[list[bool]] = mask.view(blocks, -1).tolist()
    return [each for row in rows for each in (*row, *[False] * (init_r - len(row)))]


def portable(value: Tensor | str) -> Tensor:
    """An entry of a state dictionary for a file: whole, on the CPU, and in memory of its own."""
    if isinstance(value, str):  # the extra state of a sharded model
        return torch.tensor(json.loads(value), dtype=torch.int64, device="cpu")
    return _whole(value).clone()


def _whole(tensor: Any) -> Tensor:
    return gather([tensor])[0].detach().cpu()
