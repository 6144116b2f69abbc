"""PEFT's `get_peft_model_state_dict` and `set_peft_model_state_dict`: an adapter's tensors by the names of its file."""

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
    """An adapter's tensors, on the CPU, under the names that its file has.

    Args:
        model: the adapted model; what ``torch.compile`` or DistributedDataParallel made of it does as well.
        state_dict: the model's own state dictionary, whole; None: as it is now.
        adapter_name: which adapter.
        unwrap_compiled: a compiled model is always unwrapped.
        save_embedding_layers: as for `PeftModel.save_pretrained`.

    Raises:
        TypeError: no model that rankwise has adapted.
        ValueError: there is no such adapter.

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
    """Give an attached adapter the values that `get_peft_model_state_dict` took from one of the same configuration.

    A run of AdaLoRA goes on. The values must have the ranks that it has now, and a triplet that is cut now becomes 0.

    Args:
        model: the adapted model, or what ``torch.compile`` or DistributedDataParallel made of it.
        peft_model_state_dict: all of an adapter's tensors, under the names of its file.
        adapter_name: which adapter.
        ignore_mismatched_sizes: must be False: values that do not fit are refused.
        low_cpu_mem_usage: makes no difference here.

    Returns:
        PyTorch's pair of ``missing_keys`` and ``unexpected_keys``, both empty: otherwise there is an error.

    Raises:
        TypeError: no model that rankwise has adapted.
        ValueError: there is no such adapter, or the values are not all of one that fits. Nothing has changed then.

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
    """The state dictionary of the base model alone, under the names that it has without adapters.

    Args:
        model: the adapted model, or what ``torch.compile`` or DistributedDataParallel made of it.

    Raises:
        TypeError: no model that rankwise has adapted.

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
    """Give the base model the values that `get_base_model_state_dict` took; the adapters stay as they are.

    Args:
        model: the adapted model, or what ``torch.compile`` or DistributedDataParallel made of it.
        state_dict: values by the names of the base model.
        strict: refuse names that are missing or that the base model does not have.

    Returns:
        PyTorch's pair of ``missing_keys`` and ``unexpected_keys``.

    Raises:
        TypeError: no model that rankwise has adapted.
        ValueError: an adapter is merged, so that the weights are not the base model's.
        RuntimeError: names are missing or unexpected and ``strict``, or a shape is another.
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
            f"This {type(model).__name__} is no model that rankwise has adapted: call `rankwise.get_peft_model` first."
            + (" For a model of PEFT's own, call PEFT's function." if hasattr(model, "peft_config") else "")
        )
    return model
