"""PEFT's functions for state dictionaries: the tensors of an adapter, and those of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from rankwise import storage
from rankwise.attach.targets import own_modules
from rankwise.model import PeftModel
from rankwise.run.run_tensors import BUFFERS


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors, on the CPU, under the names in an adapter file.

    Args:
        model: the adapted model, or the result of ``torch.compile`` or DistributedDataParallel on it.
        state_dict: whole state dictionary of the model. None: the model's current one.
        adapter_name: name of the adapter.
        unwrap_compiled: accepted for compatibility with PEFT. A compiled model is always unwrapped.
        save_embedding_layers: whether to include embeddings, as for `PeftModel.save_pretrained`.

    Returns:
        The tensors by name, in the shapes and dtypes in which `PeftModel.save_pretrained` writes them.

    Raises:
        TypeError: ``model`` is not adapted by rankwise.
        ValueError: the adapter does not exist.

    Example:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["0"]))
        >>> sorted(get_peft_model_state_dict(model))
        ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    own = _adapted(model)
    own._check_name(adapter_name)
    return storage.file_tensors(
        own, adapter_name, own._controller_of(adapter_name), state_dict, save_embedding_layers
    )


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Load tensors that `get_peft_model_state_dict` returned into an attached adapter of the same configuration.

    A run of AdaLoRA continues. The values must have the current ranks, and triplets that are cut now become 0.

    Args:
        model: the adapted model, or the result of ``torch.compile`` or DistributedDataParallel on it.
        peft_model_state_dict: all tensors of an adapter, under the names in an adapter file.
        adapter_name: name of the adapter.
        ignore_mismatched_sizes: must be False, because values that do not fit are refused.
        low_cpu_mem_usage: accepted for compatibility with PEFT, without effect.

    Returns:
        PyTorch's pair of ``missing_keys`` and ``unexpected_keys``. Both are empty, since any difference is an error.

    Raises:
        TypeError: ``model`` is not adapted by rankwise.
        ValueError: the adapter does not exist, or the tensors are incomplete or do not fit. Nothing has changed.

    Example:
        >>> import torch, rankwise as rw
        >>> config = rw.LoraConfig(r=2, target_modules=["0"])
        >>> model = rw.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
        >>> set_peft_model_state_dict(model, get_peft_model_state_dict(model))
        <All keys matched successfully>
    """
    if ignore_mismatched_sizes:
        raise ValueError(
            "`ignore_mismatched_sizes` is not offered: attach an adapter with the configuration of the values."
        )
    own = _adapted(model)
    own._check_name(adapter_name)
    own._refuse_merged()
    storage.load_file_tensors(own, adapter_name, own._controller_of(adapter_name), peft_model_state_dict)
    return _IncompatibleKeys([], [])


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dictionary of the base model alone, under the names that it has without adapters.

    Args:
        model: the adapted model, or the result of ``torch.compile`` or DistributedDataParallel on it.

    Returns:
        The tensors by name, in the base model's shapes and dtypes.

    Raises:
        TypeError: ``model`` is not adapted by rankwise.

    Example:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["0"]))
        >>> sorted(get_base_model_state_dict(model))
        ['0.bias', '0.weight']
    """
    own = _adapted(model)
    state = own.state_dict()
    return {name: state[name] for name in _base_names(own) if name in state}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Load tensors that `get_base_model_state_dict` returned into the base model. The adapters stay as they are.

    Args:
        model: the adapted model, or the result of ``torch.compile`` or DistributedDataParallel on it.
        state_dict: tensors by the base model's names, in its shapes.
        strict: whether to refuse names that are missing or that the base model does not have.

    Returns:
        PyTorch's pair of ``missing_keys`` and ``unexpected_keys``.

    Raises:
        TypeError: ``model`` is not adapted by rankwise.
        ValueError: an adapter is merged, so that the weights are not the base model's.
        RuntimeError: a shape differs; or names are missing or unexpected, and ``strict`` is True.

    Example:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["0"]))
        >>> set_base_model_state_dict(model, get_base_model_state_dict(model))
        <All keys matched successfully>
    """
    own = _adapted(model)
    own._refuse_merged()
    held = own.state_dict()
    names = dict.fromkeys(name for name in _base_names(own) if name in held)
    missing = [name for name in names if name not in state_dict]
    unexpected = [name for name in state_dict if name not in names]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"The base model's state dictionary has missing keys {missing} and unexpected keys {unexpected}."
        )
    own.load_state_dict({name: value for name, value in state_dict.items() if name in names}, strict=False)
    return _IncompatibleKeys(missing, unexpected)


def _base_names(model: PeftModel) -> list[str]:
    modules = {"": model, **own_modules(model)}
    found = []
    for path, module in modules.items():
        for name in (*module._parameters, *module._buffers):
            if name not in BUFFERS:
                found.append(f"{path}.{name}".removeprefix("."))
    return found


def _adapted(model: Any) -> PeftModel:
    for name in ("module", "_orig_mod"):  # DistributedDataParallel, torch.compile
        if not isinstance(model, PeftModel) and isinstance(getattr(model, name, None), nn.Module):
            model = getattr(model, name)
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"This {type(model).__name__} is not a model that rankwise has adapted: call `rankwise.get_peft_model` "
            "first."
            + (" For a model of PEFT's own, call PEFT's function." if hasattr(model, "peft_config") else "")
        )
    return model
