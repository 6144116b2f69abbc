"""Reading a recipe from a YAML file and overrides, and checking all of it before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rankwise.recipes.errors import Problem, RecipeError, did_you_mean, raise_problems, refusal
from rankwise.recipes.problems import adapter_problems, schedule_problems, translated
from rankwise.recipes.recipe import BaseRecipe
from rankwise.recipes.tasks import TASKS, load_task
from rankwise.recipes.training import run_problems, training_problems


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, data_needed: bool = True) -> BaseRecipe:
    r"""Read a recipe, apply overrides and check all of it, without loading data or a model.

    Args:
        path: the YAML file.
        overrides: ``key=value`` strings, with a dotted key (``training.max_steps=50``) and a YAML value. ``~key``
            removes a key.
        data_needed: whether the files in the section ``data`` must exist.

    Returns:
        The recipe, as an instance of the task's class.

    Raises:
        RecipeError: the recipe can't be used. The error lists all problems, each with its key and line.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "reviews.yaml")
        >>> _ = path.write_text("model: bert-base-uncased\ntask: text-classification\noutput: output\n"
        ...                     "data: {train: reviews.csv, held_out: 0.2}\n")
        >>> recipe = load_recipe(path, ["training.max_steps=50"], data_needed=False)
        >>> recipe.method, recipe.training.max_steps
        ('adalora', 50)
    """
    data, lines = read_recipe(Path(path))
    return check_recipe(data, lines, Path(path), overrides, data_needed=data_needed)


def check_recipe(
    data: DictConfig,
    lines: Mapping[str, int],
    path: Path,
    overrides: Sequence[str] = (),
    *,
    data_needed: bool = True,
) -> BaseRecipe:
    """Apply overrides to a recipe's data and check all of it, as `load_recipe` does.

    Args:
        data: the recipe's keys.
        lines: the line of each dotted key in ``path``, from 1. Keys that are not in the file have no line.
        path: the recipe's file, for messages and for paths relative to the recipe's folder.
        overrides: the overrides, as for `load_recipe`.
        data_needed: whether the files in the section ``data`` must exist.

    Raises:
        RecipeError: the recipe can't be used. The error lists all problems.
    """
    data = _override(data, overrides, path)
    name = data.get("task")
    if not isinstance(name, str) or name not in TASKS:
        message = "is missing." if name is None else f"there is no task {name!r}."
        raise refusal(
            _located("task", lines, overrides), f"{message} {did_you_mean(str(name), TASKS)}", str(path)
        )
    raise_problems(_in_order(list(_too_large(data)), lines, overrides), str(path))
    task = load_task(name)
    try:
        recipe = task.Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        problems = [
            *translated(error, task.Recipe),
            *adapter_problems(data.get("adapter")),
            *training_problems(data.get("training")),
        ]
        raise RecipeError(_in_order(problems, lines, overrides), str(path)) from None
    recipe._source, recipe._overrides = path, tuple(overrides)
    found = [each for each in task.check(recipe) if data_needed or not each.where.startswith("data.")]
    named = list(training_problems(data.get("training")))
    problems = [
        *adapter_problems(recipe.adapter),
        *schedule_problems(recipe, data),
        *(named or run_problems(recipe, task.metrics(recipe))),
        *found,
    ]
    raise_problems(_in_order(problems, lines, overrides), str(path))
    return recipe


def _too_large(value: Any, key: str = "") -> Iterator[Problem]:
    """Whole numbers that no tensor can hold."""
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _too_large(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield Problem(key, f"must be less than 2**63, but is {value}.")


def read_recipe(path: Path) -> tuple[DictConfig, dict[str, int]]:
    """Read a recipe's data from its file, unchecked, and the line of every key.

    Raises:
        RecipeError: there is no such file, or it is not YAML with keys.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {str(path)!r}.{_near_recipe(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {str(path)!r} can't be read: {error}") from error
    return parse_recipe(text, path)


def parse_recipe(text: str, path: Path) -> tuple[DictConfig, dict[str, int]]:
    """Parse the text of a recipe: its data, unchecked, and the line of every key.

    Raises:
        RecipeError: the text is not YAML with keys. The message names ``path``.
    """
    try:
        data = OmegaConf.create(text)
        lines = dict(_key_lines(yaml.compose(text, Loader=yaml.SafeLoader)))
    except yaml.YAMLError as error:
        raise RecipeError(f"is not valid YAML: {_one_line(error)}", str(path)) from error
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
    """Every dotted key of a YAML document, with its line, from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, f"{name}.")


def _override(data: Any, overrides: Sequence[str], path: Path) -> Any:
    """Apply overrides and resolve references such as ``${training.seed}``."""
    for override in overrides:
        if override.startswith("~"):
            _take_out(data, override[1:])
            continue
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise RecipeError(
                f"An override is key=value, such as training.max_steps=50, but this is {override!r}."
            )
        try:
            data = OmegaConf.merge(data, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
            raise refusal(f"override {override}", _one_line(error), str(path)) from error
    try:
        return OmegaConf.to_container(data, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(_one_line(error), str(path)) from error


def _take_out(data: Any, key: str) -> None:
    parent, _, name = key.rpartition(".")
    holder = OmegaConf.select(data, parent) if parent else data
    if not isinstance(holder, DictConfig) or name not in holder:
        raise RecipeError(f"The override ~{key} removes a key that the recipe does not have.")
    del holder[name]


def _in_order(
    problems: Sequence[Problem], lines: Mapping[str, int], overrides: Sequence[str]
) -> list[Problem]:
    """The problems with their keys' lines, sorted by line. Those of overrides and of keys without a line come last."""

    def line(problem: Problem) -> int:
        last = 10**9
        return last if _is_overridden(problem.where, overrides) else lines.get(problem.where, last)

    ordered = sorted(problems, key=line)
    return [Problem(_located(problem.where, lines, overrides), problem.message) for problem in ordered]


def _located(key: str, lines: Mapping[str, int], overrides: Sequence[str]) -> str:
    """The place of a key's value: an override, or a line of the recipe. Overrides within a section are listed with it.

    Example:
        >>> _located("training.max_steps", {"training.max_steps": 7}, [])
        'line 7, training.max_steps'
        >>> _located("training.max_steps", {"training.max_steps": 7}, ["training.max_steps=many"])
        'override of training.max_steps'
        >>> _located("schedule", {"schedule": 9}, ["schedule.tinit=0.9"])
        'line 9, with schedule.tinit=0.9, schedule'
    """
    if _is_overridden(key, overrides):
        return f"override of {key}"
    line = [f"line {lines[key]}"] if key in lines else []
    inner = [f"with {each}" for each in overrides if each.lstrip("~").startswith(f"{key}.")]
    return ", ".join([*line, *inner, key])


def _is_overridden(key: str, overrides: Sequence[str]) -> bool:
    """Whether an override sets the key or a section that contains it."""
    names = (override.partition("=")[0].lstrip("~").strip() for override in overrides)
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
