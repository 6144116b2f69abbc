"""Finding the recipe and the model for an adapter's folder, written by rankwise or by PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rankwise.recipes.errors import Problem, RecipeError
from rankwise.recipes.load import check_recipe, read_recipe
from rankwise.recipes.models import head_modules, new_weights
from rankwise.recipes.recipe import BaseRecipe
from rankwise.recipes.tasks import TASKS, TaskData, load_task
from rankwise.recipes.training import device_problem

_CONFIG, _RECIPE = "adapter_config.json", "recipe.yaml"
_TASK_OF_TYPE = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "causal-lm",
}
_TASK_OF_CLASS = {
    r".*ForSequenceClassification": "text-classification",
    r".*ForTokenClassification": "token-classification",
    r".*ForImageClassification": "image-classification",
    r"Whisper.*": "speech-recognition",
    r".*(ForCausalLM|LMHeadModel)": "causal-lm",
}
# Keys of the data section that choose training rows, which have no meaning where nothing trains.
_ABOUT_TRAINING = ("eval", "held_out", "train_size", "eval_split", "subset", "train_split")
# Keys of the section ``training`` that matter where nothing trains. The others were checked when the run began, and
# rules may have become stricter since.
_NOT_ABOUT_TRAINING = ("per_device_eval_batch_size", "seed", "bf16", "fp16", "use_cpu")
_WITH_LABELS = ("text-classification", "token-classification", "image-classification")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's folder, and a recipe that reads new data instead of training data.

    Args:
        folder: the adapter's folder.
        recipe: the recipe, as an instance of the task's class.
        labels: the names of the adapter's labels, by number. None: the task has none.
        is_own: whether ``rankwise train`` wrote the folder.
    """

    folder: Path
    recipe: BaseRecipe
    labels: Sequence[str] | None
    is_own: bool

    def model(self, processor: Any, notes: list[str]) -> Any:
        """Load the base model with the adapter, ready to predict.

        Args:
            processor: the task's tokenizer, feature extractor or image processor.
            notes: the list to which a note is added if no file holds some of the weights.

        Raises:
            RecipeError: the adapter does not fit the model.
        """
        from transformers import set_seed

        from rankwise.model import PeftModel

        data = TaskData(train=(), evaluation=(), labels=self.labels)
        # Random, frozen weights get the values that they had in the run.
        set_seed(self.recipe.training.seed)
        base = load_task(self.recipe.task).new_model(self.recipe, data, processor, weights=True)
        random, heads = new_weights(base), head_modules(base)
        try:
            model = PeftModel.from_pretrained(base, self.folder)
        except (ValueError, TypeError, OSError) as error:
            raise RecipeError(str(error)) from error
        held = tensor_shapes(self.folder)
        missing = [name for name in random if f"base_model.model.{name}" not in held]
        untrained = [name for name in missing if name.partition(".")[0] in heads or not self.is_own]
        if untrained:
            raise RecipeError(
                f"{self.folder}: neither the base model {self.recipe.model!r} nor the adapter has the weights "
                f"{', '.join(untrained[:3])}: predictions would be random. Name the model that the adapter was "
                "trained on, with model=…; or train again with these modules in `modules_to_save`."
            )
        if missing:
            modules = dict.fromkeys(name.rpartition(".")[0] for name in missing)
            notes.append(
                f"No file holds the weights of {', '.join(modules)}, which were random and frozen in training: they "
                "are drawn again from its seed. To keep them, train with them in adapter.modules_to_save."
            )
        return model.eval()


def open_adapter(
    folder: str | Path,
    file: str,
    overrides: Sequence[str] = (),
    recipe: str | Path | None = None,
    *,
    truth_needed: bool = True,
) -> SavedAdapter:
    """Find an adapter's task, and make a recipe that reads ``file``.

    Args:
        folder: the adapter's folder, written by ``rankwise train`` or by PEFT.
        file: the new data: anything that ``data.train`` may be in a recipe of the task.
        overrides: ``key=value`` strings for the recipe, as in `load_recipe`.
        recipe: the recipe to use. None: the one in the folder or, if there is none, one made from PEFT's configuration.
        truth_needed: whether the data must have the columns with true labels or texts.

    Raises:
        RecipeError: the folder holds no adapter, its task is unknown, or the data lacks columns.
    """
    folder = Path(folder).expanduser()
    config = _adapter_config(folder)
    path = Path(recipe) if recipe is not None else folder / _RECIPE
    if recipe is not None or path.is_file():
        data, lines = read_recipe(path)
        if recipe is None:
            of_run: Any = data.get("training") or {}
            data["training"] = {key: of_run[key] for key in _NOT_ABOUT_TRAINING if key in of_run}
            for key in ("adapter", "schedule"):
                data.pop(key, None)
    else:
        path = folder / _CONFIG
        data, lines = _recipe_of_config(folder, config, overrides), {}
    section: Any = OmegaConf.to_container(data.get("data") or OmegaConf.create({}))
    kept = {key: value for key, value in section.items() if key not in _ABOUT_TRAINING}
    data["data"] = {**kept, "train": str(file)}
    data.pop("device", None)  # the device of the training; this machine may have another
    labels = _labels(folder, data) if data.get("task") in _WITH_LABELS else None
    if labels is not None:
        data["data"]["labels"] = labels
    try:
        made = check_recipe(data, lines, path, overrides, data_needed=truth_needed)
    except RecipeError as error:
        # PEFT's configuration holds no key of a recipe, so nothing in it could be mended.
        raise RecipeError(
            name_columns(error.problems), None if path.name == _CONFIG else error.source
        ) from None
    own: Any = made
    own.data._nothing_trains = True
    chosen = getattr(own.data, "labels", None)
    names = None if chosen is None else [str(name) for name in chosen]
    problem = _labels_problem(labels, names) or device_problem(made)
    if problem is not None and problem.where != "training.fp16":  # half precision is for training
        raise RecipeError([problem], str(path))
    return SavedAdapter(folder, made, names, is_own=(folder / _RECIPE).is_file())


def name_columns(problems: Iterable[Problem]) -> list[Problem]:
    """Add to problems about missing columns the argument that names another column."""
    return [
        Problem(each.where, f"{each.message} Name the column: {each.where.split()[-1]}=NAME")
        if "has no column" in each.message
        else each
        for each in problems
    ]


def _labels_problem(known: Sequence[str] | None, given: Sequence[str] | None) -> Problem | None:
    """The problem with labels in another order than the adapter's, whose meanings would be exchanged."""
    if known is None or given is None or list(known) == list(given) or sorted(known) != sorted(given):
        return None
    return Problem(
        "data.labels", f"the adapter's labels are {', '.join(known)}, in this order. Take data.labels out."
    )


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        hint = "" if folder.is_dir() else " There is no such folder."
        raise RecipeError(
            f"{str(folder)!r} holds no {_CONFIG}, so it is not an adapter's folder.{hint} Give the `output` of a run."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path} must hold an object with the adapter's fields.")
    return config


def _recipe_of_config(folder: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """A recipe made from PEFT's configuration. Overrides may give keys that the configuration lacks."""
    given = {key.strip(): value for key, _, value in (override.partition("=") for override in overrides)}
    task = given.get("task") or _task(config)
    base = given.get("model") or config.get("base_model_name_or_path")
    missing = []
    if not task:
        kinds = ", ".join(TASKS)
        missing.append(
            Problem("task", f"{_CONFIG} does not name it. Add task=…, one of {kinds}; or --recipe FILE.")
        )
    if not base:
        missing.append(Problem("model", f"{_CONFIG} names no base model. Add model=…, or --recipe FILE."))
    if missing:
        raise RecipeError(missing, str(folder))
    data: dict[str, Any] = {"model": base, "task": task, "adapter": {}, "data": {}, "output": str(folder)}
    rows = _head_rows(folder) if task == "text-classification" else None
    if rows == 1:
        data["problem_type"] = "regression"
    return OmegaConf.create(data)


def _task(config: Mapping[str, Any]) -> str | None:
    """The task, by the adapter's ``task_type`` or by the class of its model."""
    if config.get("task_type") in _TASK_OF_TYPE:
        return _TASK_OF_TYPE[config["task_type"]]
    name = str((config.get("auto_mapping") or {}).get("base_model_class") or "")
    return next((task for pattern, task in _TASK_OF_CLASS.items() if re.fullmatch(pattern, name)), None)


def _labels(folder: Path, data: DictConfig) -> list[str] | None:
    """The names of an adapter's labels. None: the recipe gives them, or the task is regression."""
    if data.get("problem_type") == "regression":
        return None
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
        return [str(names[number]) for number in sorted(names, key=int)] or None
    except (OSError, ValueError, AttributeError):
        pass
    rows = _head_rows(folder)
    if data["data"].get("labels") or rows is None:
        return None
    return _base_labels(str(data.get("model")), rows) or [f"LABEL_{number}" for number in range(rows)]


def _base_labels(model: str, count: int) -> list[str] | None:
    """The base model's own label names, if their number is ``count``."""
    from transformers import AutoConfig

    try:
        names = AutoConfig.from_pretrained(model, local_files_only=Path(model).exists()).id2label
    except (OSError, ValueError):
        return None
    return [str(names[number]) for number in sorted(names)] if len(names) == count else None


def _head_rows(folder: Path) -> int | None:
    """The number of outputs of the head in an adapter's file, or None. The head's last layer has the fewest rows."""
    rows = [
        shape[0]
        for name, shape in tensor_shapes(folder).items()
        if len(shape) == 2 and name.endswith(".weight") and re.search(r"\.(classifier|score)\b", name)
        if ".lora_" not in name
    ]
    return min(rows, default=None)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in an adapter's ``adapter_model.safetensors``, by name. Empty: there is no such file.

    Raises:
        RecipeError: the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RecipeError(f"{path} can't be read: {error}") from error
