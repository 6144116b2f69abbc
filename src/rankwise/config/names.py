"""The names of a configuration's fields: ours, those of PEFT that are not ours, and what a slip was meant to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from rankwise.config.checks import short
from rankwise.config.suggest import nearest

# Slips that spelling alone does not mend, as they reach here: lower case, without underscores.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "alpha": ("lora_alpha",),
    "deltar": ("deltaT",),
    "dropout": ("lora_dropout",),
    "initialrank": ("init_r", "r"),
    "initrank": ("init_r", "r"),
    "interval": ("deltaT",),
    "lorarank": ("init_r", "r"),
    "lorar": ("init_r", "r"),
    "maxsteps": ("total_step",),
    "modules": ("target_modules",),
    "numtrainingsteps": ("total_step",),
    "p": ("lora_dropout",),
    "rank": ("init_r", "r"),
    "rslora": ("use_rslora",),
    "targetrank": ("target_r", "r"),
    "warmupsteps": ("tinit",),
}

# PEFT's fields that this library does not have and that never change what a saved adapter computes.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
        "velora_config",
    }
)

# PEFT's other fields that this library does not have: unless neutral, they change what an adapter computes.
_REFUSED = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "monteclora_config",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
    }
)


class CheckedKeywords:
    """Refuses unknown keywords with the nearest real name; the dataclass keeps its typed ``__init__``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError(
                f"{cls.__name__} takes keyword arguments only: {cls.__name__}(target_modules=...)."
            )
        names = field_names(cls)
        for name in kwargs:
            if name not in names:
                raise TypeError(unknown_keyword(cls, name, names))
        return super().__new__(cls)


def check_extra(extra: Any) -> dict[str, Any]:
    """Fields of a file that the configuration does not have: refused unless they change nothing."""
    if not isinstance(extra, Mapping):
        raise TypeError(f"`extra` must be a dictionary, but is {short(extra)}.")
    for name, value in extra.items():
        if name == "init_lora_weights" or name in _HARMLESS or value in (None, False, {}, []):
            continue
        if name in _REFUSED:
            raise ValueError(
                f"`{name}`={short(value)} changes what the adapter computes, and is not supported."
            )
        raise ValueError(
            f"`{name}`={short(value)} is not known, and may change what the adapter computes. "
            "If you know that it does not, take it out of the file."
        )
    return dict(extra)


def field_names(cls: type[Any]) -> frozenset[str]:
    """Names of a configuration's fields."""
    return frozenset(each.name for each in dataclasses.fields(cls))


def unknown_keyword(cls: type[Any], name: str, names: AbstractSet[str]) -> str:
    """What to say of a keyword that is none of ``names``."""
    message = f"{cls.__name__} has no field `{name}`."
    if name == "peft_type":
        return f"{message} The class says it: {cls.__dict__.get('peft_type')}."
    for other in cls.__subclasses__():
        if name in field_names(other):
            return f"{message} It is one of {other.__name__}'s."
    if name in _HARMLESS | _REFUSED:
        return f"{message} It is one of PEFT's that rankwise does not offer: leave it out."
    folded = _folded(name)
    choices = {_folded(each): each for each in sorted(names - {"extra"})}
    alias = next((each for each in _ALIASES.get(folded, ()) if each in names), None)
    near = nearest(folded, choices)
    guess = alias or (choices[near] if near else None)
    if guess is None:
        return f"{message} Its fields are {', '.join(choices.values())}."
    return f"{message} Did you mean `{guess}`?"


def _folded(name: str) -> str:
    return name.lower().replace("_", "")
