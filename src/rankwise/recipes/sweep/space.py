"""The search space of a sweep: keys of a recipe, with ranges or lists of values, for AdaLoRA and for LoRA."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rankwise.config import AdaLoraConfig
from rankwise.recipes.errors import RecipeError, refusal
from rankwise.recipes.load import load_recipe
from rankwise.recipes.recipe import BaseRecipe, adapter_keys

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = None | bool | int | float | str

# Keys and sections that can't be varied, with the reasons.
_FIXED: Mapping[str, str] = {
    "data": "results on other data can't be compared.",
    "task": "results of other tasks can't be compared.",
    "problem_type": "results of other tasks can't be compared.",
    "model": "results of other models can't be compared by their loss alone. Sweep a recipe for each.",
    "output": "every trial has its own folder in the sweep's.",
    "device": "it changes no result.",
    "samples": "it changes no result.",
    "sample_tokens": "it changes no result.",
    "generation": "it changes how a model writes, not what it learns.",
    "adapter.method": "--beside lora trains LoRA, too.",
    "training.seed": "the best seed is luck. All trials have the same seed, so that they can be compared.",
    "training.metric_for_best_model": "--metric names the metric that compares trials.",
    "training.greater_is_better": "--metric names the metric that compares trials.",
    "training.load_best_model_at_end": "trials are compared by their best adapters.",
    "training.eval_strategy": "trials are compared at the same points of the run.",
    "training.eval_steps": "trials are compared at the same points of the run.",
    "training.eval_examples": "trials are compared on the same examples.",
    "training.early_stopping_patience": "the pruner stops trials that fall behind.",
}
_NO_RESULT = "it changes no result."


@dataclass(frozen=True)
class Dimension:
    """One key to vary, over a range or a list of values.

    Args:
        key: the recipe's dotted key.
        low: the lowest value of a range. None: the values are a list.
        high: the highest value of a range. None: the values are a list.
        log: whether to search the range by orders of magnitude.
        choices: the values of a list. Values that are lists or sections are given as YAML strings.

    Example:
        >>> parse_dimension("training.learning_rate=1e-4..1e-2")
        Dimension(key='training.learning_rate', low=0.0001, high=0.01, log=True, choices=())
        >>> parse_dimension("adapter.target_r=1,2,4").choices
        (1, 2, 4)
    """

    key: str
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values to check: all values of a list, or both ends of a range."""
        return self.choices or (self.low, self.high)

    def suggest(self, trial: Trial) -> Value:
        """Let Optuna choose the value for a trial."""
        if self.choices:
            chosen: Value = trial.suggest_categorical(self.key, self.choices)
            return chosen
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.key, self.low, self.high, log=self.log)
        return trial.suggest_float(self.key, float(self.low or 0), float(self.high or 0), log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether the search includes a value."""
        if self.choices:
            return any(value == each and type(value) is type(each) for each in self.choices)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and float(self.low or 0) <= value <= float(self.high or 0)

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key}: {', '.join(map(str, self.choices))}"
        return f"{self.key}: {self.low:g} to {self.high:g}{', by orders of magnitude' if self.log else ''}"


def parse_dimension(text: str) -> Dimension:
    """Read ``key=low..high`` or ``key=value,value,...``.

    A range between two whole numbers holds only whole numbers. A range of positive numbers that spans a factor of 10
    or more is searched by orders of magnitude.

    Args:
        text: the key and its values.

    Raises:
        RecipeError: the text has neither form, the range is empty, the list has one value, or the key can't be varied.

    Example:
        >>> parse_dimension("training.num_train_epochs=1..3").log
        False
    """
    key, equals, values = text.partition("=")
    key = key.strip()
    if not equals or not key or not values.strip():
        raise refusal(
            f"--over {text}",
            "say what to vary, such as training.learning_rate=1e-4..1e-2 or adapter.target_r=1,2,4,8.",
        )
    reason = next((why for name, why in _FIXED.items() if key == name or key.startswith(f"{name}.")), None)
    if reason is None and key in BaseRecipe.free_when_resuming:
        reason = _NO_RESULT
    if reason is not None:
        raise refusal(f"--over {text}", f"{key} can't be varied: {reason}")
    first, dots, last = values.partition("..")
    if dots:
        return _range(key, _number(first, text), _number(last, text), text)
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError as error:
        raise refusal(f"--over {text}", f"is not a list of values: {' '.join(str(error).split())}") from error
    choices = tuple(_as_number(each) for each in found)
    if len({repr(each) for each in choices}) < 2:
        raise refusal(
            f"--over {text}",
            "has one value, so there is nothing to search. Set it as an override: key=value.",
        )
    return Dimension(key, choices=tuple(dict.fromkeys(choices)))


def _as_number(value: Any) -> Value:
    """A value as Optuna accepts it. YAML reads 1e-4 as text, so it is converted. Lists and sections become text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return json.dumps(value)


def _number(text: str, whole: str) -> int | float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise refusal(f"--over {whole}", f"{text.strip()!r} is not a number. A range is LOW..HIGH.")
    return int(text) if text.strip().lstrip("+-").isdecimal() else number


def _range(key: str, low: int | float, high: int | float, text: str) -> Dimension:
    if low >= high:
        raise refusal(f"--over {text}", f"the range is empty: {low:g} is not less than {high:g}.")
    return Dimension(key, low, high, log=low > 0 and high >= 10 * low)


def usual_dimensions(recipe: BaseRecipe) -> list[Dimension]:
    """The default search: learning rate and rank, around the recipe's own."""
    rate = recipe.training.learning_rate
    dimensions = [Dimension("training.learning_rate", rate / 10, rate * 10, log=True)]
    if recipe.adapter_fields.get("plan") or recipe.adapter_fields.get("rank_pattern"):
        return dimensions  # the recipe gives the rank of each layer
    key = "target_r" if recipe.method == "adalora" else "r"
    most = recipe.adapter_fields.get("init_r", math.inf)
    own = recipe.adapter_fields.get(key, AdaLoraConfig().target_r)
    ranks = sorted({rank for rank in (1, 2, 4, 8, own) if rank <= most})
    if len(ranks) > 1:
        dimensions.append(Dimension(f"adapter.{key}", choices=tuple(ranks)))
    return dimensions


def check_dimensions(path: Path, overrides: Sequence[str], dimensions: Sequence[Dimension]) -> None:
    """Refuse keys and values that the recipe can't have.

    Raises:
        RecipeError: a key is given twice, or a value can't be used. The message names it.
    """
    twice = [each.key for each in dimensions]
    for key in dict.fromkeys(twice):
        if twice.count(key) > 1:
            raise refusal(f"--over {key}", "is given twice. Take one out.")
    for each in dimensions:
        for value in each.ends:
            try:
                load_recipe(path, [*overrides, override(each.key, value)])
            except RecipeError as error:
                problems = "; ".join(problem.message for problem in error.problems)
                raise refusal(f"--over {each.key}", f"the value {value} can't be used: {problems}") from error


def override(key: str, value: Value) -> str:
    """The string ``key=value`` for `load_recipe`.

    Example:
        >>> override("training.learning_rate", 1e-05), override("adapter.target_modules", '["query"]')
        ('training.learning_rate=0.00001', 'adapter.target_modules=["query"]')
    """
    if isinstance(value, float):
        text = f"{value:.17g}"
        return f"{key}={value:.20f}".rstrip("0") if "e" in text else f"{key}={text}"
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


# --- LoRA's trials -----------------------------------------------------------------------------------------------


def beside_overrides(recipe: BaseRecipe, values: Mapping[str, Value]) -> list[str]:
    """The overrides that turn a recipe for AdaLoRA into one for LoRA with as many parameters after training.

    The scale of the updates stays the same, and so do all settings that both methods have.

    Args:
        recipe: a recipe for AdaLoRA.
        values: the values that the trial varies. Keys that LoRA does not have are left out.
    """
    fields = dict(recipe.adapter_fields)
    target = values.get("adapter.target_r", fields.get("target_r", AdaLoraConfig().target_r))
    rank = max(1, round(float(target)))
    known = adapter_keys("lora")
    changed = {key.partition(".")[2] for key in values if key.startswith("adapter.")}
    drop = [key for key in fields if key not in known or key == "init_lora_weights"]
    overrides = [f"~adapter.{key}" for key in drop if key != "plan"]
    if any(value is not None for value in recipe.schedule.model_dump().values()):
        overrides.append("~schedule")
    overrides.append("adapter.method=lora")
    if "plan" not in fields:
        overrides.append(f"adapter.r={rank}")
    if "lora_alpha" not in fields and "lora_alpha" not in changed:
        overrides.append(f"adapter.lora_alpha={2 * rank}")
    for key, value in values.items():
        name = key.partition(".")[2]
        if key.startswith("schedule.") or (key.startswith("adapter.") and name not in known):
            continue
        overrides.append(override(key, value))
    return overrides


def beside_dimensions(dimensions: Sequence[Dimension]) -> list[Dimension]:
    """The dimensions that LoRA has. ``adapter.target_r`` is one of them, because it becomes LoRA's rank."""
    known = {f"adapter.{key}" for key in adapter_keys("lora")} | {"adapter.target_r"}
    return [
        each
        for each in dimensions
        if not each.key.startswith("schedule.") and (not each.key.startswith("adapter.") or each.key in known)
    ]
