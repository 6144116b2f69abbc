"""Names of configuration fields: rankwise's own, those that only PEFT has, and suggestions for misspelt ones."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from types import FrameType
from typing import TYPE_CHECKING, Any

from rankwise.config.checks import short
from rankwise.config.suggest import nearest

# Mistaken names that spelling alone does not correct, in lower case and without underscores.
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

# Fields that only PEFT has and that never change what a saved adapter computes.
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

# Other fields that only PEFT has. They change what an adapter computes, unless their value is neutral.
_REFUSED = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "layers_to_tie",
        "lora_bias",
        "megatron_config",
        "monteclora_config",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
    }
)

# Fields that PEFT fills in and that do not describe the adapter.
_SAY_NOTHING = frozenset({"auto_mapping", "peft_version"})
# Neutral values of PEFT's fields that are neither None, False nor empty.
_DEFAULTS: Mapping[str, Any] = {"megatron_core": "megatron.core", "qalora_group_size": 16}

ON_PEFTS_LAYERS = (
    "Leave it out, or attach the adapter with PEFT and let `rankwise.adapt_ranks` find its ranks: PEFT's own layers "
    "have it."
)


# Modules of PEFT that attach adapters. They first ask a configuration for its kind.
_ATTACHES = ("peft.mapping", "peft.mapping_func", "peft.peft_model")


class _TakesNeutral(type):
    """Accepts fields that only PEFT has, as long as their values say that they are not used."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a configuration from the fields that it has."""
        names = field_names(cls)
        if not names.issuperset(kwargs):
            kwargs = _own_fields(cls, names, kwargs)
        return super().__call__(*args, **kwargs)


class CheckedKeywords(metaclass=_TakesNeutral):
    """Refuses unknown keywords and suggests the nearest known name. The dataclass keeps its typed ``__init__``.

    Fields that only PEFT has can be set to their neutral values, which say that they are not used. They can be read.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError(
                f"{cls.__name__} takes keyword arguments only: {cls.__name__}(target_modules=...)."
            )
        return super().__new__(cls)

    if not TYPE_CHECKING:  # the type checker would accept misspelt names otherwise

        def __getattr__(self, name: str) -> Any:
            """Return a field that only PEFT has: the value in the file, or else its neutral value."""
            if name in _HARMLESS | _REFUSED:
                return self.__dict__.get("extra", {}).get(name, _neutral(name))
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def is_prompt_learning(self) -> bool:
        """False: rankwise has no method that trains prompts. PEFT asks for this property.

        Raises:
            TypeError: one of PEFT's own functions asks. It cannot work with rankwise's models and configurations.
        """
        self._refuse_peft(sys._getframe(1))
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False: rankwise does not have PEFT's method of adaption prompts. PEFT asks for this property."""
        self._refuse_peft(sys._getframe(1))
        return False

    def _refuse_peft(self, caller: FrameType) -> None:
        module = caller.f_globals.get("__name__")
        if module == "peft.utils.save_and_load":
            raise TypeError(
                f"PEFT's `{caller.f_code.co_name}` finds nothing in a model that rankwise has adapted: call "
                f"`rankwise.{caller.f_code.co_name}` instead."
            )
        if module in _ATTACHES:
            raise TypeError(
                f"This {type(self).__name__} is rankwise's, and PEFT takes its own: pass it to "
                "`rankwise.get_peft_model`. Or give PEFT a `peft.LoraConfig`, and let its ranks adapt with "
                "`rankwise.adapt_ranks(model)`, or in a trainer with `callbacks=[rankwise.AdaptRanks(...)]`."
            )


def _own_fields(cls: type[Any], names: AbstractSet[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the fields ``names``. PEFT's other fields must be neutral; some go into ``extra``."""
    own = {name: value for name, value in given.items() if name in names}
    said = {name: value for name, value in given.items() if name in _SAY_NOTHING and value is not None}
    for name, value in given.items():
        if name not in names and not is_neutral(cls, name, value):
            raise TypeError(unknown_keyword(cls, name, names))
    return {**own, "extra": {**said, **own.get("extra", {})}} if said else own


def is_neutral(cls: type[Any], name: str, value: Any) -> bool:
    """Tell whether ``name`` is a field that only PEFT has and ``value`` says that it is not used.

    Example:
        >>> from rankwise import LoraConfig
        >>> is_neutral(LoraConfig, "use_dora", False), is_neutral(LoraConfig, "use_dora", True)
        (True, False)
    """
    if name == "peft_type":
        return getattr(value, "value", value) in (None, cls.__dict__.get("peft_type"))
    if name not in _HARMLESS | _REFUSED:
        return False
    if name == "runtime_config" and value is not None:  # it only says on which device DoRA computes
        key = "ephemeral_gpu_offload"
        return not (value.get(key) if isinstance(value, Mapping) else getattr(value, key, True))
    empty = isinstance(value, (Mapping, AbstractSet, list, tuple)) and not value
    return name in _SAY_NOTHING or value is None or value is False or empty or value == _neutral(name)


def _neutral(name: str) -> Any:
    if name in _DEFAULTS:
        return _DEFAULTS[name]
    return False if name.startswith("use_") or name in ("lora_bias", "ensure_weight_tying") else None


def check_extra(extra: Any) -> dict[str, Any]:
    """Check the fields of a file that the configuration does not have.

    Raises:
        TypeError: ``extra`` is not a dictionary.
        ValueError: a field is known to change what the adapter computes.
    """
    if not isinstance(extra, Mapping):
        raise TypeError(f"`extra` must be a dictionary, but is {short(extra)}.")
    for name, value in extra.items():
        if name in _REFUSED and value not in (None, False, {}, []):
            raise ValueError(
                f"`{name}`={short(value)} changes what the adapter computes, and rankwise's own layers don't have it. "
                "Load the adapter with PEFT; `rankwise.adapt_ranks` finds ranks on PEFT's own layers, too."
            )
    return dict(extra)


def tell_of_unknown(extra: Mapping[str, Any], source: str) -> None:
    """Warn of unknown fields in a file, except those whose values say that they are not used."""
    known = _HARMLESS | _REFUSED | {"init_lora_weights"}
    unknown = {k: v for k, v in extra.items() if k not in known and v not in (None, False, {}, [])}
    if unknown:
        said = ", ".join(f"`{name}`={short(value)}" for name, value in unknown.items())
        warnings.warn(
            f"{source}: rankwise does not know {said}, and ignores it, as PEFT does. Newer versions of PEFT "
            "may write such fields. If one of them changes what the adapter computes, the model differs from the one "
            "that was trained: compare their outputs.",
            UserWarning,
            stacklevel=3,
        )


def field_names(cls: type[Any]) -> frozenset[str]:
    """Return the names of a configuration's fields."""
    return frozenset(each.name for each in dataclasses.fields(cls))


def unknown_keyword(cls: type[Any], name: str, names: AbstractSet[str]) -> str:
    """Write the error message for a keyword that is not among ``names``."""
    message = f"{cls.__name__} has no field `{name}`."
    if name == "peft_type":
        return (
            f"`peft_type` of a {cls.__name__} is {str(cls.__dict__.get('peft_type'))!r}: leave it out, or take another "
            "class."
        )
    for other in cls.__subclasses__():
        if name in field_names(other):
            return f"{message} It is one of {other.__name__}'s."
    if name in _HARMLESS | _REFUSED:
        return f"{message} {ON_PEFTS_LAYERS}"
    folded = _folded(name)
    choices = {_folded(each): each for each in sorted((names | _HARMLESS | _REFUSED) - {"extra"})}
    alias = next((each for each in _ALIASES.get(folded, ()) if each in names), None)
    near = nearest(folded, choices)
    guess = alias or (choices[near] if near else None)
    if guess is None:
        return f"{message} Its fields are {', '.join(sorted(names - {'extra'}))}."
    if guess not in names:
        return f"{message} If it means PEFT's `{guess}`: {ON_PEFTS_LAYERS[0].lower()}{ON_PEFTS_LAYERS[1:]}"
    return f"{message} Did you mean `{guess}`?"


def _folded(name: str) -> str:
    return name.lower().replace("_", "")
