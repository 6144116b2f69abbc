"""Checks the options of adaptive ranks in a training framework's configuration, when the framework reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from rankwise.config import AdaLoraConfig
from rankwise.config.checks import check_positive, short
from rankwise.config.suggest import suggestion

OPTIONS = ("target_r", "tinit", "tfinal", "deltaT")
# Starts of PEFT's LoRA that leave the base weights as they are.
STARTS = ("true", "false", "gaussian", "eva", "orthogonal")


def check_options(
    options: Any, where: str, rank: Any, rank_name: str, max_steps: Any = None
) -> dict[str, Any]:
    """Check the options of `rankwise.AdaptRanks` that a user wrote in a framework's configuration, and return them.

    Args:
        options: mapping of ``target_r``, ``tinit``, ``tfinal`` and ``deltaT``. None: the defaults.
        where: the framework's name of the place, for messages.
        rank: rank of the adapter at the start, at least 1. None: the configuration does not tell it.
        rank_name: the framework's name of ``rank``.
        max_steps: optimizer steps of the run. None, 0 or less: the configuration does not tell them.

    Returns:
        The options as keyword arguments.

    Raises:
        TypeError: ``options`` is not a mapping, or a value has the wrong type.
        ValueError: an option is unknown, ``target_r`` is above ``rank``, or the schedule leaves no step for pruning.

    Example:
        >>> check_options({"target_r": 4, "tinit": 0.1}, "`rankwise`", rank=8, rank_name="lora_r")
        {'target_r': 4, 'tinit': 0.1}
        >>> check_options({"target": 4}, "`rankwise`", rank=8, rank_name="lora_r")
        Traceback (most recent call last):
        ...
        ValueError: `rankwise` has no option `target`; it has target_r, tinit, tfinal, deltaT. Did you mean 'target_r'?
    """
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise TypeError(f"{where} must hold options such as `target_r: 4`, but is {short(options)}.")
    for name in options:
        if name not in OPTIONS:
            hint = suggestion(str(name), OPTIONS)
            raise ValueError(f"{where} has no option `{name}`; it has {', '.join(OPTIONS)}.{hint}")
    given = {name: value for name, value in options.items() if value is not None}
    known_rank = rank if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 else None
    try:
        target_r = check_positive("target_r", given["target_r"]) if "target_r" in given else None
        if target_r is not None and known_rank is not None and target_r > known_rank:
            raise ValueError(
                f"`target_r`={target_r:g} is greater than `{rank_name}`={known_rank}, and ranks only fall. Set "
                f"`{rank_name}` to at least {math.ceil(target_r)} (twice `target_r` is usual), or a smaller `target_r`."
            )
        schedule = {name: given[name] for name in ("tinit", "tfinal", "deltaT") if name in given}
        steps = max_steps if isinstance(max_steps, int) and max_steps > 0 else None
        AdaLoraConfig(init_r=2, target_r=1, total_step=steps, **schedule)  # checks the schedule
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    return given


def check_start(value: Any, where: str) -> None:
    """Refuse a start of LoRA that moves a part of the base weights into A and B.

    Args:
        value: value of PEFT's ``init_lora_weights`` in the framework's configuration. None: the default.
        where: the framework's name of this setting.

    Raises:
        ValueError: the start changes the base weights.
    """
    if value is not None and str(value).lower() not in STARTS:
        raise ValueError(
            f"`{where}: {value}` moves a part of the base weights into LoRA's factors, so cutting a rank would take it "
            f"out of the model. Leave `{where}` out to let ranks adapt."
        )


def moved(framework: str, version: Callable[[], str], what: str, tested: str) -> RuntimeError:
    """Make the error for a framework whose extension point is missing.

    It is a RuntimeError. Frameworks may take an ImportError for a plugin that is not installed, and train without it.
    """
    try:
        found = f"{framework} {version()}"
    except Exception:
        found = f"The installed {framework}"
    return RuntimeError(
        f"{found} has no {what}, by which rankwise adapts ranks there, so this run would train plain LoRA. rankwise is "
        f"tested with {framework} {tested}: install that version, or a newer rankwise."
    )


def lacking(holder: Any, names: Collection[str]) -> str | None:
    """The first of ``names`` that ``holder`` lacks. None if it has all."""
    return next((name for name in names if not hasattr(holder, name)), None)
