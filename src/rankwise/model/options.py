"""What PEFT's functions are given beside what they need: each option is used, refused, or told to have no effect."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rankwise.config import LoraConfig
from rankwise.config.checks import check_flag
from rankwise.config.hub_options import check_hub_options
from rankwise.config.suggest import suggestion

# Options that say where or how fast values are read. Here they go to the device of the layer that they belong to.
_NO_DIFFERENCE = frozenset(
    "low_cpu_mem_usage ephemeral_gpu_offload torch_device use_safetensors offload_folder offload_dir offload_index "
    "offload_buffers offload_state_dict max_memory".split()
)
# Options that belong to loading the base model, which has been loaded already.
_OF_THE_BASE = frozenset(
    {"device_map", "dtype", "torch_dtype", "load_in_4bit", "load_in_8bit", "quantization_config"}
)
# Arguments with a place of their own, for messages about misspelt ones.
_ALREADY_TAKEN = frozenset({"model_id", "adapter_name", "is_trainable", "adapter_compute_dtype"})


@dataclass
class LoadOptions:
    """What `from_pretrained` and `load_adapter` are told of how to load an adapter.

    Args:
        config: the configuration to use in place of the folder's.
        autocast_adapter_dtype: whether a half-precision base gets a float32 adapter.
        hub: options for the Hugging Face hub.
    """

    config: LoraConfig | None = None
    autocast_adapter_dtype: bool = True
    hub: dict[str, Any] = field(default_factory=dict)


def load_options(function: str, given: Mapping[str, Any]) -> LoadOptions:
    """Sort what ``function`` was given.

    Raises:
        TypeError: it has no such option, or a value is of a wrong type.
        ValueError: an option is known, but not offered.

    Warns:
        UserWarning: an option belongs to loading the base model, and has no effect on an adapter.

    Example:
        >>> load_options("load_adapter", {"revision": "main", "low_cpu_mem_usage": True}).hub
        {'revision': 'main'}
    """
    own = {"config", "autocast_adapter_dtype", "key_mapping", "ignore_mismatched_sizes", "hotswap"}
    check_hub_options(function, given, own | _NO_DIFFERENCE | _OF_THE_BASE | _ALREADY_TAKEN)
    config = given.get("config")
    if config is not None and not isinstance(config, LoraConfig):
        raise TypeError(
            f"`config` must be a rankwise LoraConfig or AdaLoraConfig, but is a {type(config).__name__}."
        )
    for name in ("key_mapping", "ignore_mismatched_sizes", "hotswap"):
        if given.get(name):
            raise ValueError(f"{function} does not offer `{name}`: {_INSTEAD[name]}")
    told = sorted(name for name in _OF_THE_BASE if given.get(name) is not None)
    if told:
        warnings.warn(
            f"{', '.join(f'`{name}`' for name in told)} belongs to loading the base model, and has no effect on "
            f"{function}: the adapter goes where the base model is. Give it to the base model's `from_pretrained`; "
            "what the adapter computes in is set by `adapter_compute_dtype`.",
            UserWarning,
            stacklevel=4,
        )
    casts = check_flag("autocast_adapter_dtype", given.get("autocast_adapter_dtype", True))
    known = own | _NO_DIFFERENCE | _OF_THE_BASE
    return LoadOptions(config, casts, {name: value for name, value in given.items() if name not in known})


_INSTEAD = {
    "key_mapping": "rename the tensors in a copy of the adapter's file.",
    "ignore_mismatched_sizes": "load the adapter into the base model that it was trained on.",
    "hotswap": "`load_adapter` under another name, then `set_adapter`.",
}

# What PEFT's and Transformers' `save_pretrained` take that changes nothing of what is written here.
_SAVING_SAME = frozenset(
    {"save_function", "max_shard_size", "token", "save_peft_format", "save_original_format"}
)
_SAVING_NOT = {
    "push_to_hub": "call `model.push_to_hub(repo_id)`",
    "path_initial_model_for_weight_conversion": "use PEFT's own layers under `rankwise.adapt_ranks`",
    "convert_pissa_to_lora": "use PEFT's own layers under `rankwise.adapt_ranks`",
    "variant": "save into another folder",
}


def check_save_options(given: Mapping[str, Any], own: Collection[str]) -> None:
    """See that `save_pretrained` was given no option that it would have to pass over.

    Args:
        given: what was given beside its own arguments.
        own: the names of its own arguments.

    Raises:
        TypeError: there is no such option; the message names the nearest.
        ValueError: an option is known, but not offered.
    """
    for name, value in given.items():
        if name in _SAVING_NOT:
            if value:
                raise ValueError(f"`save_pretrained` does not offer `{name}`: {_SAVING_NOT[name]}.")
        elif name not in _SAVING_SAME | {"is_main_process"}:
            raise TypeError(f"save_pretrained has no argument {name!r}.{suggestion(name, sorted(own))}")


def check_attach_options(function: str, given: Mapping[str, Any]) -> bool:
    """Whether a half-precision base gets a float32 adapter, by what ``function`` was given; all else is checked.

    Raises:
        TypeError: there is no such option; the message names the nearest.
        ValueError: an option is known, but not offered.

    Example:
        >>> check_attach_options("get_peft_model", {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True})
        False
    """
    known = ("autocast_adapter_dtype", "low_cpu_mem_usage", "mixed", "revision")
    for name in given:
        if name not in known:
            raise TypeError(f"{function} has no argument {name!r}.{suggestion(name, known)}")
    if given.get("mixed"):
        raise ValueError(
            "`mixed=True` is not offered: all adapters of a model are LoRA or AdaLoRA, and may be mixed without it."
        )
    check_flag("low_cpu_mem_usage", given.get("low_cpu_mem_usage", False))
    return check_flag("autocast_adapter_dtype", given.get("autocast_adapter_dtype", True))
