"""PEFT's `inject_adapter_in_model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from rankwise.adapters import factor_name
from rankwise.config import LoraConfig
from rankwise.model import get_peft_model
from rankwise.storage import PREFIX


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: Any,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Any:
    """Attach an adapter to ``model``, in place, and return ``model``. It is `get_peft_model` under PEFT's other name.

    Args:
        peft_config: an `AdaLoraConfig` or a `LoraConfig`.
        model: base model or adapted model, any ``nn.Module``.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: accepted for compatibility with PEFT, without effect.
        state_dict: tensors of an adapter, whose names replace ``target_modules``. Their values are not loaded. None:
            ``peft_config`` names the layers.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: as `get_peft_model`.
        ValueError: as `get_peft_model`; or ``state_dict`` names no factor of an adapter.

    Example:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> names = {"base_model.model.1.lora_A.weight": None, "base_model.model.1.lora_B.weight": None}
        >>> model = rw.inject_adapter_in_model(rw.LoraConfig(r=2), model, state_dict=names)
        >>> model.peft_config["default"].target_modules
        ['1']
    """
    if state_dict is not None:
        found = [factor_name(name.removeprefix(PREFIX)) for name in state_dict]
        paths = list(dict.fromkeys(each.path for each in found if each is not None))
        if not paths:
            raise ValueError("`state_dict` holds no factor of an adapter, so it names no layer to adapt.")
        peft_config = replace(peft_config, target_modules=paths)
    return get_peft_model(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
