"""The tasks that a recipe can name. A task is a module with the members of `Task`, registered in `TASKS`.

To add a task, write such a module and add its line to `TASKS`. The command line, checking, planning, progress,
checkpoints and reports then work for the task without changes. A task of several files is a package. Its module
``task`` has the members.
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
    """A recipe's data, read and checked.

    Args:
        train: the training examples, with a length.
        evaluation: the held-out examples, with a length.
        notes: notes for the user about the data, one sentence each.
        labels: the names of the labels, by number. None: the task has none.
    """

    train: Any
    evaluation: Any
    notes: Sequence[str] = ()
    labels: Sequence[str] | None = None


# Stands for a recipe's data where there is none. It has no examples, but labels, so that a head can be made.
NO_DATA = TaskData(train=(), evaluation=(), labels=("0", "1"))


@dataclass(frozen=True)
class Metric:
    """A number that tells how good a model is.

    Args:
        key: the metric's name in the result of ``Trainer.evaluate()``, without ``eval_``.
        title: the name to show.
        style: the format specification for its values.
        greater_is_better: whether larger values are better.
    """

    key: str
    title: str
    style: str = field(default=".4f")
    greater_is_better: bool = True


class Task(Protocol):
    """The members of a task's module.

    Two more members are optional:

    - ``samples(recipe, data, processor, model)`` returns texts that the model writes after a few prompts, to compare
      before and after training. Each is a dictionary with ``prompt``, ``written`` and optionally ``expected``.
    - ``details(recipe, data, processor, examples, prediction)`` returns details of predictions (see
      `rankwise.recipes.details`).
    """

    # The recipe's class, with the task's own keys.
    Recipe: type[BaseRecipe]
    # PEFT's name for the kind of task, or None.
    TASK_TYPE: str | None

    @staticmethod
    def check(recipe: Any) -> Iterable[Problem]:
        """The problems that can be found without reading all the data, such as missing files and columns."""

    @staticmethod
    def read_data(recipe: Any) -> TaskData:
        """Read and check all rows.

        Raises:
            RecipeError: some rows can't be used. The message names files and lines.
        """

    @staticmethod
    def processor(recipe: Any) -> Any:
        """The tokenizer, feature extractor or image processor. It is saved with the adapter."""

    @staticmethod
    def new_model(recipe: Any, data: TaskData, processor: Any, *, weights: bool) -> Any:
        """The model to adapt. Without ``weights`` it is on the meta device, which takes no time."""

    @staticmethod
    def largest_batch(recipe: Any, config: Any) -> Mapping[str, Tensor]:
        """The largest training batch of one process, labels included, from the configuration alone.

        `rankwise.recipes.memory` measures activations with this batch. It holds the arguments of the model's forward
        that the collator makes, by name. Their shapes and dtypes are those of ``training.per_device_train_batch_size``
        examples of the greatest length. Values and devices do not matter, because nothing is computed.
        ``memory.batches`` makes such tensors.

        This function must not read files: ``rankwise plan --memory`` has neither data nor a tokenizer. There,
        `new_model` gets `NO_DATA` as its data and None as its processor.

        Args:
            recipe: the run's recipe.
            config: the configuration of the model that `new_model` made.
        """

    @staticmethod
    def trainer_arguments(
        recipe: Any, data: TaskData, processor: Any, model: Any
    ) -> tuple[dict[str, Any], list[str]]:
        """The arguments of Transformers' ``Trainer`` that depend on the task, and notes for the user.

        These arguments are data, collator and metrics. The key ``trainer`` may hold a subclass of
        `rankwise.recipes.trainer.RecipeTrainer` to use instead of it.
        """

    @staticmethod
    def metrics(recipe: Any) -> Sequence[Metric]:
        """The metrics to show before and after training."""

    @staticmethod
    def usage(recipe: Any, data: TaskData, base: str, folder: str) -> str:
        """Python lines that load the adapter in ``folder`` onto the model ``base`` and use it."""


def load_task(name: str) -> Task:
    """Import a task's module by the name that a recipe gives it."""
    return cast(Task, importlib.import_module(f"{__name__}.{TASKS[name]}"))
