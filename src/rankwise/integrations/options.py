"""The options of adaptive ranks in the configuration of a training framework, checked when that is read."""

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
    """The options of `rankwise.AdaptRanks` that a user wrote under ``where``, as keyword arguments.

    Args:
        options: a mapping of ``target_r``, ``tinit``, ``tfinal`` and ``deltaT``; None for the defaults.
        where: what the framework calls the place, for messages.
        rank: of the adapter at the start, as far as the configuration says it; else None.
        rank_name: what the framework calls ``rank``.
        max_steps: optimizer steps of the run, where the configuration says them; else None, 0 or less.

    Raises:
        TypeError: it is no mapping, or a value has a wrong type.
        ValueError: there is no such option, ``target_r`` is above ``rank``, or the schedule leaves no step for pruning.

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
        value: PEFT's ``init_lora_weights``, as the framework's configuration says it; None for the default.
        where: what the framework calls it.

    Raises:
        ValueError: it is such a start.
    """
    if value is not None and str(value).lower() not in STARTS:
        raise ValueError(
            f"`{where}: {value}` moves a part of the base weights into LoRA's factors, so cutting a rank would take it "
            f"out of the model. Leave `{where}` out to let ranks adapt."
        )


def moved(framework: str, version: Callable[[], str], what: str, tested: str) -> RuntimeError:
    """The error of a framework whose extension point is not where it was.

    It is no ImportError, which frameworks may take for a plugin that is not installed, and train on without it.
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
    """The first of ``names`` that ``holder`` does not have; None if it has all."""
    return next((name for name in names if not hasattr(holder, name)), None)
