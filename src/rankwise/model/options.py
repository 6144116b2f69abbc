"""Options of PEFT's functions: each is used, refused, or accepted without effect."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rankwise.config import LoraConfig
from rankwise.config.checks import check_flag
from rankwise.config.hub_options import check_hub_options
from rankwise.config.suggest import suggestion

# Options for where or how fast values are read. Here each value goes to the device of its layer.
_NO_DIFFERENCE = frozenset(
    "low_cpu_mem_usage ephemeral_gpu_offload torch_device use_safetensors offload_folder offload_dir offload_index "
    "offload_buffers offload_state_dict max_memory".split()
)
# Options for loading the base model, which is loaded already.
_OF_THE_BASE = frozenset(
    {"device_map", "dtype", "torch_dtype", "load_in_4bit", "load_in_8bit", "quantization_config"}
)
# Names of the functions' own arguments, for messages about misspelt ones.
_ALREADY_TAKEN = frozenset({"model_id", "adapter_name", "is_trainable", "adapter_compute_dtype"})


@dataclass
class LoadOptions:
    """Options of `from_pretrained` and `load_adapter` for loading an adapter.

    Args:
        config: configuration that replaces the one in the folder. None: the folder's.
        autocast_adapter_dtype: whether the adapter of a half-precision base is float32.
        hub: options for the Hugging Face hub, by name.
    """

    config: LoraConfig | None = None
    autocast_adapter_dtype: bool = True
    hub: dict[str, Any] = field(default_factory=dict)


def load_options(function: str, given: Mapping[str, Any]) -> LoadOptions:
    """Sort the options that ``function`` was given.

    Args:
        function: name of the function, for messages.
        given: the options, by name.

    Raises:
        TypeError: an option is unknown, or a value has the wrong type.
        ValueError: an option of PEFT's is not offered.

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
            "`adapter_compute_dtype` sets the dtype in which the adapter computes.",
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

# Arguments of PEFT's and Transformers' `save_pretrained` that do not change the files written here.
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
    """Refuse options of `save_pretrained` that it does not know or cannot do.

    Args:
        given: the options that are not among its own arguments, by name.
        own: names of its own arguments.

    Raises:
        TypeError: an option is unknown. The message suggests the nearest known one.
        ValueError: an option of PEFT's or Transformers' is not offered.
    """
    for name, value in given.items():
        if name in _SAVING_NOT:
            if value:
                raise ValueError(f"`save_pretrained` does not offer `{name}`: {_SAVING_NOT[name]}.")
        elif name not in _SAVING_SAME | {"is_main_process"}:
            raise TypeError(f"save_pretrained has no argument {name!r}.{suggestion(name, sorted(own))}")


def check_attach_options(function: str, given: Mapping[str, Any]) -> bool:
    """Check options for attaching, and return whether the adapter of a half-precision base is float32.

    Args:
        function: name of the function, for messages.
        given: the options, by name.

    Raises:
        TypeError: an option is unknown. The message suggests the nearest known one.
        ValueError: an option of PEFT's is not offered.

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
