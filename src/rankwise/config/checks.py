"""Checks of single configuration fields. Each returns the value in plain form, or its error names the field."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from rankwise.config.suggest import suggestion


class Default(int):
    """A whole number that is a default, as distinct from the same number given by a user."""


class DefaultFraction(float):
    """A fractional number that is a default, as distinct from the same number given by a user."""


def default(value: float) -> Default | DefaultFraction:
    """Mark ``value`` as a default: a `Default` if it is whole, a `DefaultFraction` otherwise."""
    return Default(value) if value == int(value) else DefaultFraction(value)


def check_whole(name: str, value: Any, least: int | None) -> int:
    """Check that ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be a whole number, but is {short(value)}.")
    if least is not None and value < least:
        raise ValueError(f"`{name}` must be at least {least}, but is {value}.")
    return _bounded(name, int(value))


def check_rank(name: str, value: Any) -> int:
    """Check that ``value`` is a whole number of at least 1."""
    return check_whole(name, value, least=1)


def check_number(name: str, value: Any) -> int | float:
    """Check that ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, but is {short(value)}.")
    if isinstance(value, numbers.Integral):
        return _bounded(name, int(value))
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, but is {value}.")
    return float(value)


def _bounded(name: str, value: int) -> int:
    """Refuse integers of 2**53 and more: they do not fit into a float."""
    if abs(value) >= 2**53:
        raise ValueError(f"`{name}` is absurdly large.")
    return value


def check_positive(name: str, value: Any) -> int | float:
    """Check that ``value`` is a finite number greater than 0."""
    number = check_number(name, value)
    if number <= 0:
        raise ValueError(f"`{name}` must be greater than 0, but is {value}.")
    if number >= 2**53:
        raise ValueError(f"`{name}` is absurdly large.")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Check that ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, but is {short(value)}.")
    return value


def check_text(name: str, value: Any) -> str | None:
    """Check that ``value`` is text or None. A path becomes text."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if value is not None and not isinstance(value, str):
        raise TypeError(f"`{name}` must be text or None, but is {short(value)}.")
    return value


def check_one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """Check that ``value`` is one of the words ``choices``. A member of an enumeration becomes its value."""
    value = getattr(value, "value", value)
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be one of {', '.join(choices)}, but is {short(value)}.")
    if value not in choices:
        hint = suggestion(value, choices)
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.{hint}")
    return str(value)


def check_start(value: Any, choices: str) -> bool | str:
    """Check a value of `init_lora_weights` that every kind of adapter takes; an error quotes ``choices``."""
    if isinstance(value, bool) or value == "gaussian":
        return value  # type: ignore[no-any-return]
    if not isinstance(value, str):
        raise TypeError(f"`init_lora_weights` must be {choices}, but is {short(value)}.")
    raise ValueError(f"`init_lora_weights`={value!r} is not offered here: use {choices}.")


def check_names(name: str, value: Any) -> list[str] | None:
    """Check a list of names and drop doubles. A list keeps its order; a set is sorted."""
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, AbstractSet)):
        raise TypeError(f"`{name}` must be a list of names, but is {short(value)}.")
    for each in value:
        if not isinstance(each, str):
            raise TypeError(f"`{name}` must be a list of names, but holds {short(each)}.")
        if not each:
            raise ValueError(f"`{name}` holds an empty name.")
    return list(dict.fromkeys(sorted(value) if isinstance(value, AbstractSet) else value))


def check_names_or_pattern(name: str, value: Any) -> list[str] | str | None:
    """Check a list of names, as `check_names` does, or a regular expression."""
    if not isinstance(value, str):
        return check_names(name, value)
    check_regular_expression(name, value)
    return value


def check_regular_expression(name: str, value: str) -> None:
    """Refuse text that is not a regular expression."""
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"`{name}` holds {value!r}, which is not a regular expression: {error}.") from None


def check_pattern(name: str, value: Any, check: Any) -> dict[str, Any]:
    """Check a dictionary from path ends or regular expressions to values, each of which ``check`` checks."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dictionary, but is {short(value)}.")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"`{name}` must have names for keys, but has {short(key)}.")
        check_regular_expression(name, key)
    return {key: check(f"{name}[{key!r}]", each) for key, each in value.items()}


def check_kept_ranks(value: Any, init_r: int, stacks: bool = False) -> dict[str, list[bool]] | None:
    """Check AdaLoRA's ``rank_pattern``. Keys of older files end in an adapter's name, which is removed.

    With ``stacks`` a list may have ``init_r`` booleans for each of several matrices.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"`rank_pattern` must be a dictionary, but is {short(value)}.")
    kept: dict[str, list[bool]] = {}
    for key, mask in value.items():
        match = re.fullmatch(r"(.+\.lora_E)(\.[^.]+)?", key) if isinstance(key, str) else None
        if match is None:
            raise ValueError(f"`rank_pattern` must have keys such as 'layer.0.lora_E', but has {short(key)}.")
        if isinstance(mask, (str, bytes)) or not isinstance(mask, Sequence):
            raise TypeError(f"`rank_pattern[{key!r}]` must be a list of booleans, but is {short(mask)}.")
        if not all(isinstance(each, bool) for each in mask):
            raise TypeError(f"`rank_pattern[{key!r}]` must be a list of booleans, but is {short(mask)}.")
        if len(mask) != init_r and not (stacks and mask and len(mask) % init_r == 0):
            raise ValueError(f"`rank_pattern[{key!r}]` must have init_r={init_r} booleans, not {len(mask)}.")
        if match[1] in kept:
            raise ValueError(f"`rank_pattern` has {match[1]!r} twice, once with an adapter's name.")
        kept[match[1]] = list(mask)
    return kept or None


def check_layer_indices(value: Any) -> list[int] | int | None:
    """Check a layer's index, or a list of indices, and drop doubles."""
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return check_whole("layers_to_transform", value, least=0)
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, AbstractSet)):
        raise TypeError(f"`layers_to_transform` must be an index or a list of them, but is {short(value)}.")
    indices = [check_whole("layers_to_transform", each, least=0) for each in value]
    return list(dict.fromkeys(indices)) or None


def short(value: Any) -> str:
    """Show a value in a message, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
