"""The tasks that a recipe can name. A task is one module with the members of `Task`, registered in `TASKS`.

To add a task, write such a module and add its line to `TASKS`; the command line, checking, planning, progress,
checkpoints and reports then work for it as they are. A task of several files is a package whose module ``task`` has
the members.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from rankwise.recipes.errors import Problem
from rankwise.recipes.recipe import BaseRecipe

if TYPE_CHECKING:
    from torch import Tensor

TASKS: Mapping[str, str] = {
    "text-classification": "text_classification",
    "speech-recognition": "speech_recognition.task",
    "image-classification": "image_classification",
    "causal-lm": "causal_lm.task",
    "token-classification": "token_classification",
}


@dataclass(frozen=True)
class TaskData:
    """What was read and checked of a recipe's data.

    Args:
        train: the training examples; has a length.
        evaluation: the held-out examples; has a length.
        notes: what the user should know about them, a sentence each.
        labels: the names of the labels, by number; None if the task has none.
    """

    train: Any
    evaluation: Any
    notes: Sequence[str] = ()
    labels: Sequence[str] | None = None


# What stands for a recipe's data where there is none: no examples, and labels so that a head can be made.
NO_DATA = TaskData(train=(), evaluation=(), labels=("0", "1"))


@dataclass(frozen=True)
class Metric:
    """A number that tells how good a model is.

    Args:
        key: its name in ``Trainer.evaluate()``'s result, without ``eval_``.
        title: its name for people.
        style: how to format it.
        greater_is_better: whether a better model has more of it.
    """

    key: str
    title: str
    style: str = field(default=".4f")
    greater_is_better: bool = True


class Task(Protocol):
    """The members of a task's module.

    A task whose model writes may also have ``samples(recipe, data, processor, model)``: what it writes to a few
    prompts, each a dictionary with ``prompt``, ``written`` and maybe ``expected``, to show before and after. And any
    task may have ``details(recipe, data, processor, examples, prediction)``; see `rankwise.recipes.details`.
    """

    # The recipe's class, with the task's own keys.
    Recipe: type[BaseRecipe]
    # PEFT's name for the kind of task, or None.
    TASK_TYPE: str | None

    @staticmethod
    def check(recipe: Any) -> Iterable[Problem]:
        """What can be known to be wrong without reading all the data: files and columns that are missing."""

    @staticmethod
    def read_data(recipe: Any) -> TaskData:
        """Read and check all rows.

        Raises:
            RecipeError: naming files and lines.
        """

    @staticmethod
    def processor(recipe: Any) -> Any:
        """The tokenizer or feature extractor, which is saved beside the adapter."""

    @staticmethod
    def new_model(recipe: Any, data: TaskData, processor: Any, *, weights: bool) -> Any:
        """The model to adapt; without ``weights``, on the meta device and in an instant."""

    @staticmethod
    def largest_batch(recipe: Any, config: Any) -> Mapping[str, Tensor]:
        """A training batch of one process as large as batches get, labels included, from the configuration alone.

        It is how `rankwise.recipes.memory` measures activations: what the collator gives to the model's forward, by
        name, with the shapes and dtypes of ``training.per_device_train_batch_size`` examples of the greatest length.
        Values do not matter (``memory.batches`` makes such tensors), nor does the device: nothing is computed.

        ``rankwise plan --memory`` has neither data nor tokenizer: then `new_model` gets `NO_DATA` and None as its
        processor, and this function, which must not read files, gives the batch for the model that it makes.

        Args:
            recipe: the recipe.
            config: the configuration of the model that `new_model` made.
        """

    @staticmethod
    def trainer_arguments(
        recipe: Any, data: TaskData, processor: Any, model: Any
    ) -> tuple[dict[str, Any], list[str]]:
        """The arguments of Transformers' ``Trainer`` that depend on the task (data, collator, metrics), and notes.

        Under ``trainer`` there may be a class to take in place of ``Trainer``.
        """

    @staticmethod
    def metrics(recipe: Any) -> Sequence[Metric]:
        """The metrics to show before and after."""

    @staticmethod
    def usage(recipe: Any, data: TaskData, base: str, folder: str) -> str:
        """Python lines that load the adapter in ``folder`` onto the model ``base`` and use it."""


def load_task(name: str) -> Task:
    """Import a task's module by the name that a recipe gives it."""
    return cast(Task, importlib.import_module(f"{__name__}.{TASKS[name]}"))
