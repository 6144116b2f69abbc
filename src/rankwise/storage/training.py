"""Saves and restores the state from which a run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rankwise.attach.attachment import (
    Attachment,
    adapter_layers,
    bias_names,
    check_adapter_name,
    plain_name,
    plain_state,
    saved_modules,
)
from rankwise.config import AdaLoraConfig
from rankwise.files.tensors import check_finite
from rankwise.parallel.sharded import laid_out
from rankwise.run.checkpoint import check_packed_state
from rankwise.run.controller import Controller
from rankwise.run.run_tensors import BUFFERS, was_left_empty
from rankwise.run.state import RunState
from rankwise.storage.adapter_file import AdapterFile, names_of_blocks, sort_tensors
from rankwise.storage.fit import fit_all, with_all_heads
from rankwise.storage.names import (
    EXTRA_STATE,
)
from rankwise.storage.read import check_factors


def factor_keys(model: nn.Module, adapter: str) -> dict[str, str]:
    """The keys of the adapter's factors in the model's `plain_state`, with their names in the training state file."""
    return {f"{path}.{key}.{adapter}": f"{path}.{key}" for path, layer in adapter_layers(model, adapter).items()
            for key in layer.adapter_parameters(adapter)}  # fmt: skip


def training_keys(model: nn.Module, adapter: str) -> dict[str, str]:
    """The keys in the model's `plain_state` that the adapter's training changes, with their names in the file.

    They include all parameters that train, the adapter's own or not, and all buffers that training changes. Names in
    the file omit the adapter's name, so that a run can be resumed under another name.
    """
    own = factor_keys(model, adapter)
    heads = tuple(f"{path}.modules_to_save.{adapter}." for path in saved_modules(model))
    others = {*BUFFERS, EXTRA_STATE, *_trained_beside(model)}
    names = {}
    for key in plain_state(model.state_dict()):
        if heads and key.startswith(heads):
            names[key] = key.replace(f".modules_to_save.{adapter}.", ".modules_to_save.", 1)
        elif key in own or key in others:
            names[key] = own.get(key, key)
    return names


def _trained_beside(model: nn.Module) -> Iterator[str]:
    """The names of all parameters that train, and of the statistics of batch normalization."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name)
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and ".modules_to_save." not in f".{path}.":
            for name, _ in module.named_buffers(recurse=False):
                yield plain_name(f"{path}.{name}" if path else name)


def trains_more(model: Any, adapter: str) -> bool:
    """Whether training changes parts of the model that the adapter's own file does not hold."""
    biases = bias_names(
        model,
        model.peft_config[adapter].bias,
        list(adapter_layers(model, adapter)),
        list(saved_modules(model)),
    )
    held = {*map(plain_name, biases), *BUFFERS, EXTRA_STATE}
    return any(key == name and key not in held for key, name in training_keys(model, adapter).items())


def plan_from_training_state(model: nn.Module, file: AdapterFile, adapter: str) -> Attachment:
    """Fit a run's state, with all its triplets, to ``model``, which does not change.

    Raises:
        ValueError: as in `plan_from_file`.
    """
    check_adapter_name(model, adapter)
    buffers = {*BUFFERS, EXTRA_STATE, *(name for name, _ in model.named_buffers())}
    run_config = file.run_config or file.config
    uncut = sort_tensors(file.training_source, run_config, {
        key.replace(".modules_to_save.", "."): tensor
        for key, tensor in (file.training or {}).items() if key not in buffers
    })  # fmt: skip
    uncut.laid_out = False
    check_factors(uncut, cut=False)
    in_file = fit_all(model, file, file.config)[2]
    changes: dict[str, Any] = {"inference_mode": False}
    # PEFT's format has a schedule even for a run of unknown length.
    if isinstance(file.config, AdaLoraConfig):
        changes["rank_pattern"] = None
        blocks = [name for path in uncut.factors for name in names_of_blocks(file, path)]
        if _run_state(file, blocks).schedule is None:
            changes["total_step"] = None
    uncut.config = replace(run_config, **changes)
    layers, heads, rest = fit_all(model, uncut, uncut.config, all_parameters=True)
    config = with_all_heads(uncut.config, heads)
    # Tensors that don't train, such as those of a resized vocabulary.
    frozen = {name: tensor for name, tensor in in_file.items() if name not in rest}
    return Attachment(adapter, config, layers, heads, rest, frozen)  # type: ignore[arg-type]


def _run_state(file: AdapterFile, layers: list[str]) -> RunState:
    try:
        return RunState.from_tensor(layers, (file.training or {})[EXTRA_STATE])
    except KeyError:
        raise ValueError(f"{file.training_source} lacks {EXTRA_STATE!r}.") from None
    except ValueError as error:
        raise ValueError(f"{file.training_source}: {error}") from None


def prepare_training_state(
    model: nn.Module, adapter: str, file: AdapterFile, controller: Controller | None
) -> Callable[[], None]:
    """Check that an attached adapter can continue the run whose state is in a folder.

    Returns:
        A function that loads this state into the adapter.

    Raises:
        ValueError: the state is broken, or belongs to another run.
    """
    tensors, source = file.training or {}, file.training_source
    in_file = fit_all(model, file, file.config)[2]
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
        if key != EXTRA_STATE and not was_left_empty(key, own[key], tensors[name]):
            _check_like(source, name, tensors[name], own[key])
            if key in parameters or key in BUFFERS:  # any other buffer may hold infinities, as a mask does
                check_finite(source, name, tensors[name])
    if controller is not None:
        try:
            state = check_packed_state(controller, tensors[EXTRA_STATE])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if file.scales:
            scales = tuple(file.scales[pair.path] for pair in controller.factors.pairs)
            tensors = {**tensors, EXTRA_STATE: replace(state, scales=scales).to_tensor()}
    keys = {plain_name(key): key for key in model.state_dict()}
    frozen = {key: tensor.to(own[key].dtype) for key, tensor in in_file.items() if key not in names}

    def load() -> None:
        loaded = laid_out({**frozen, **{key: tensors[name] for key, name in names.items()}}, own)
        model.load_state_dict({keys[key]: tensor for key, tensor in loaded.items()}, strict=False)

    return load


def _check_like(source: str, name: str, tensor: Tensor, own: Tensor) -> None:
    if tensor.shape != own.shape:
        raise ValueError(f"{source}: {name} is {tuple(tensor.shape)}, but here {tuple(own.shape)}.")
    if tensor.dtype != own.dtype:
        raise ValueError(
            f"{source}: {name} is {tensor.dtype}, but here {own.dtype}. Load the base model in the dtype of that run."
        )
