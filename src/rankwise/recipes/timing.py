"""Estimating how long a run takes, by measuring a few of its steps."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rankwise.recipes.data.splits import some_examples
from rankwise.recipes.models import quiet
from rankwise.recipes.plan import attach, steps_in_an_epoch, total_steps
from rankwise.recipes.recipe import BaseRecipe
from rankwise.recipes.run import duration
from rankwise.recipes.tasks import load_task
from rankwise.recipes.training import processes, training_arguments

_FIRST = 2  # steps that are not measured, because the first steps are slower
_STEPS = 5  # steps that are measured


@dataclass(frozen=True)
class Timing:
    """The measured time of a step, and the estimated time of a run.

    Args:
        step: the median time of an optimizer step, in seconds.
        training: the estimated time of all steps, in seconds.
        evaluating: the estimated time of all evaluations before, during and after training, in seconds.
    """

    step: float
    training: float
    evaluating: float

    def line(self) -> str:
        """The estimate in one line."""
        total = duration(self.training + self.evaluating)
        return (
            f"about {total}: {duration(self.training)} for the steps, {self.step:.3g} s each, and "
            f"{duration(self.evaluating)} for evaluations"
        )

    def to_dict(self) -> dict[str, float]:
        """The estimate as data for JSON, in seconds."""
        return {"step": self.step, "training": self.training, "evaluating": self.evaluating}


def measure_time(recipe: BaseRecipe) -> Timing:
    """Estimate a run's time by training a few steps and evaluating a few examples. Nothing is kept.

    Args:
        recipe: the recipe that `load_recipe` returned.

    Raises:
        RecipeError: the data or the adapter can't be used.
    """
    from transformers import PrinterCallback

    from rankwise.recipes.trainer import RecipeTrainer

    task = load_task(recipe.task)
    with quiet(), tempfile.TemporaryDirectory() as nowhere:
        data = task.read_data(recipe)
        processor = task.processor(recipe)
        model = task.new_model(recipe, data, processor, weights=True)
        total = total_steps(recipe.training, len(data.train), processes())
        model, _ = attach(recipe, model, total)
        for_task, _ = task.trainer_arguments(recipe, data, processor, model)
        trainer_class = for_task.pop("trainer", RecipeTrainer)
        held_out = for_task["eval_dataset"]
        arguments = training_arguments(recipe, min(total, _STEPS + _FIRST), Path(nowhere), trainer_class)
        arguments.eval_strategy = arguments.save_strategy = "no"
        arguments.report_to = []  # so that trackers do not record these few steps
        clock = _Clock()
        trainer = trainer_class(model=model, args=arguments, callbacks=[clock], **for_task)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        few = some_examples(held_out, 2 * recipe.training.per_device_eval_batch_size)
        began = time.monotonic()
        trainer.evaluate(eval_dataset=few)
        each = (time.monotonic() - began) / len(few)
    step = statistics.median(clock.seconds[_FIRST:] or clock.seconds)
    own = recipe.training
    count = {"no": 0.0, "epoch": total / steps_in_an_epoch(own, len(data.train), processes())}.get(
        own.evaluates
    )
    if count is None:
        every = own.eval_steps or own.logging_steps
        count = total / (every if every >= 1 else every * total)
    looked_at = min(len(held_out), own.eval_examples or len(held_out))
    return Timing(step, step * total, each * (2 * len(held_out) + int(count) * looked_at))


class _Clock(TrainerCallback):
    """Measures the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock when the device has finished the step."""
        import torch

        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(time.monotonic() - self._began)
