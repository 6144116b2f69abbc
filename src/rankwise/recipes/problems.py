"""Checks of a recipe's sections, with rankwise's own messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from rankwise.recipes.errors import Problem, RecipeError, did_you_mean
from rankwise.recipes.recipe import (
    METHODS,
    BaseRecipe,
    ScheduleSection,
    TrainingSection,
    adapter_keys,
    config_class,
)

_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a section of `key: value` lines",
    "model_type": "must be a section of `key: value` lines",
    "model_attributes_type": "must be a section of `key: value` lines",
    "finite_number": "must be a finite number",
}


def translated(error: pydantic.ValidationError, recipe: type[BaseRecipe]) -> Iterator[Problem]:
    """Pydantic's errors as problems with rankwise's own messages, one for each key."""
    seen = set()
    for item in error.errors():
        location = [part for part in item["loc"] if isinstance(part, int) or not part[:1].isupper()]
        key = ".".join(str(part) for part in location)
        # A union (`int | float`) reports each of its members: one message is enough.
        key = key.removesuffix(".int").removesuffix(".float").removesuffix(".str").removesuffix(".list[str]")
        if key in seen:
            continue
        seen.add(key)
        yield Problem(key, _rule(item, location, recipe))


def _rule(item: Any, location: Sequence[str | int], recipe: type[BaseRecipe]) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        valid = _keys(recipe, location[:-1])
        return f"unknown key. {_special_hint(location) or _key_hint(str(location[-1]), valid)}"
    if kind == "missing":
        return "is missing."
    if kind == "literal_error":
        valid = [word.strip().strip("'") for word in context["expected"].replace(" or ", ", ").split(",")]
        return (
            f"must be one of {', '.join(valid)}, but is {value!r}. {did_you_mean(str(value), valid)}".rstrip()
        )
    if kind == "value_error":
        return str(context["error"]).rstrip(".") + "."
    if kind == "string_too_short":
        return "must not be empty."
    rule = _TYPES.get(kind) or _bound(kind, context) or item["msg"]
    quotes = " YAML reads yes, no, on and off as true and false: put quotes around the word."
    return f"{rule}, but is {value!r}.{quotes if rule == 'must be text' and isinstance(value, bool) else ''}"


def _bound(kind: str, context: Mapping[str, Any]) -> str | None:
    words = {
        "greater_than": "more than",
        "greater_than_equal": "at least",
        "less_than": "less than",
        "less_than_equal": "at most",
    }
    if kind not in words:
        return None
    (limit,) = context.values()
    return f"must be {words[kind]} {limit:g}"


_SYNONYMS = {
    "output_dir": "output",
    "validation": "eval",
    "test": "eval",
    "base_model": "model",
    "model_name_or_path": "model",
}


def _key_hint(name: str, valid: Sequence[str]) -> str:
    meant = _SYNONYMS.get(name)
    return f"Did you mean {meant!r}?" if meant in valid else did_you_mean(name, valid)


def _special_hint(location: Sequence[str | int]) -> str | None:
    if tuple(location) == ("schedule", "total_step"):
        return "The number of steps comes from training.max_steps or training.num_train_epochs."
    if len(location) == 1 and location[0] in TrainingSection.model_fields:
        return f"It belongs in the section `training`: training.{location[0]}."
    return None


def _keys(recipe: type[BaseRecipe], location: Sequence[str | int]) -> list[str]:
    """The valid keys of the section at ``location``."""
    section: Any = recipe
    for part in location:
        section = section.model_fields[str(part)].annotation
    return [field.alias or name for name, field in section.model_fields.items()]


def adapter_problems(adapter: Any) -> Iterator[Problem]:
    """The problems of the adapter section, found by the fields and the rules of the configuration class."""
    if adapter is None:
        adapter = {}
    if not isinstance(adapter, dict):
        return  # reported as a wrong type
    method = adapter.get("method", "adalora")
    if method not in METHODS:
        yield Problem(
            "adapter.method", f"there is no method {method!r}. {did_you_mean(str(method), METHODS)}"
        )
        return
    fields = {key: value for key, value in adapter.items() if key != "method"}
    valid = adapter_keys(method)
    unknown = [key for key in fields if key not in (*valid, "plan")]
    yield from _plan_problems(fields)
    for key in unknown:
        if key in ScheduleSection.model_fields:
            yield Problem(f"adapter.{key}", f"belongs in the section `schedule`: schedule.{key}.")
        elif key == "total_step":
            yield Problem("adapter.total_step", _special_hint(("schedule", "total_step")) or "")
        elif key == "r" and method == "adalora":
            yield Problem(
                "adapter.r", "has no effect in AdaLoRA. Set init_r (at the start) and target_r (at the end)."
            )
        elif method == "lora" and key in _ADALORA_RANKS:
            yield Problem(f"adapter.{key}", f"{_ADALORA_RANKS[key]} {_take_out(f'adapter.{key}')}")
        elif method == "lora" and key in adapter_keys("adalora"):
            yield Problem(
                f"adapter.{key}", f"is for `adapter.method: adalora` only. {_take_out(f'adapter.{key}')}"
            )
        elif key in ("task_type", "inference_mode", "peft_type"):
            yield Problem(f"adapter.{key}", "is set by the task. Take the line out.")
        else:
            yield Problem(f"adapter.{key}", f"unknown key. {_key_hint(str(key), valid)}")
    if fields.get("plan") and "init_r" in fields:
        fields.setdefault("target_r", 1)  # stands for the plan's, which is not read yet
    try:
        config_class(method)(**{key: value for key, value in fields.items() if key in valid})
    except (TypeError, ValueError) as error:
        named = re.search(r"`(\w+)`", str(error))
        key = f"adapter.{named[1]}" if named and named[1] in fields else "adapter"
        yield Problem(key, str(error))


_ADALORA_RANKS = {
    "init_r": "is AdaLoRA's rank at the start; LoRA has one rank from start to end, `adapter.r`.",
    "target_r": "is AdaLoRA's rank at the end; LoRA has one rank from start to end, `adapter.r`.",
}


def _take_out(key: str) -> str:
    return f"Take it out; on the command line: '~{key}'."  # without quotes, zsh would look for a user's home


def _plan_problems(fields: Mapping[str, Any]) -> Iterator[Problem]:
    """The problems of a plan that is not a file's name, and of keys that the plan already sets."""
    plan = fields.get("plan")
    if plan is None:
        return
    if not isinstance(plan, str):
        yield Problem("adapter.plan", f"must be a file of `rankwise probe`, but is {plan!r}.")
    for key in ("rank_pattern", "alpha_pattern"):
        if fields.get(key):
            yield Problem(f"adapter.{key}", "is given by `plan`. Take one of the two out.")


def schedule_problems(recipe: BaseRecipe, data: Mapping[str, Any]) -> Iterator[Problem]:
    """The problems of the schedule with other sections. ``data`` holds the recipe's keys without defaults."""
    if recipe.method == "lora" and data.get("schedule"):
        yield Problem(
            "schedule", f"is for `adapter.method: adalora`; LoRA's ranks are fixed. {_take_out('schedule')}"
        )
    if recipe.method == "adalora" and recipe.training.max_steps is not None:
        try:
            recipe.schedule.resolve(recipe.training.max_steps)
        except RecipeError as error:
            yield from error.problems
