"""Probing a recipe's model on the recipe's training data."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.attach.probe import Probe, probe
from rankwise.config import LoraConfig
from rankwise.recipes.errors import refusal
from rankwise.recipes.models import head_modules, quiet
from rankwise.recipes.preparing import preparing, tracked
from rankwise.recipes.recipe import BaseRecipe
from rankwise.recipes.tasks import load_task
from rankwise.recipes.training import training_arguments

if TYPE_CHECKING:
    from rich.console import Console

# The fields of the adapter section that select layers.
_WHICH = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def probe_recipe(
    recipe: BaseRecipe, *, batches: int = 8, max_rank: int = 32, console: Console | None = None
) -> Probe:
    """Average the gradients of a recipe's target layers over its first training batches, without training.

    Args:
        recipe: the recipe that `load_recipe` returned.
        batches: the number of batches, of ``training.per_device_train_batch_size`` examples each.
        max_rank: the number of directions to find in each layer.
        console: the console that shows the progress. None: the standard error.

    Returns:
        The gradients' spectra of all target layers.

    Raises:
        RecipeError: the data or the adapter can't be used.
    """
    from rich.console import Console
    from transformers import Trainer, set_seed

    console = console or Console(stderr=True)
    task = load_task(recipe.task)
    with quiet(), tempfile.TemporaryDirectory() as nowhere:
        with preparing(console, "reading the data"):
            data = task.read_data(recipe)
            processor = task.processor(recipe)
        set_seed(recipe.training.seed)
        model = task.new_model(recipe, data, processor, weights=True)
        for_task, _ = task.trainer_arguments(recipe, data, processor, model)
        trainer_class = for_task.pop("trainer", Trainer)
        # The trainer only supplies the recipe's batches and its loss. It never trains.
        trainer = trainer_class(
            model=model, args=training_arguments(recipe, 1, Path(nowhere), trainer_class), **for_task
        )
        # Only gradient checkpointing needs training mode. Otherwise dropout, which blurs gradients, is off.
        model.train(recipe.training.gradient_checkpointing)
        some = list(itertools.islice(trainer.get_train_dataloader(), batches))

        def loss(model: Any, batch: Any) -> Any:
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))

        with preparing(console, "probing"):
            shown = tracked(range(2 * len(some)), "batches, twice", 2 * len(some))

            def counted(model: Any, batch: Any) -> Any:
                next(shown, None)
                return loss(model, batch)

            try:
                return probe(model, some, _config(recipe, model), max_rank=max_rank, loss=counted)
            except (ValueError, TypeError) as error:
                raise refusal("adapter", str(error), str(recipe.source)) from error


def _config(recipe: BaseRecipe, model: Any) -> LoraConfig:
    """A configuration that selects the layers that the recipe adapts."""
    fields = {key: value for key, value in recipe.adapter_fields.items() if key in _WHICH}
    fields.setdefault("modules_to_save", head_modules(model) or None)
    return LoraConfig(task_type=load_task(recipe.task).TASK_TYPE, **fields)


def rank_of(recipe: BaseRecipe) -> float:
    """The average rank of the recipe's adapter after training, which is the default budget of a plan."""
    from rankwise.recipes.recipe import config_class

    kind = config_class(recipe.method)
    name = "target_r" if recipe.method == "adalora" else "r"
    return float(recipe.adapter_fields.get(name, kind.__dataclass_fields__[name].default))
