"""Measuring an adapter on new data with its task's metrics."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.recipes.details import Keep, details_of
from rankwise.recipes.models import quiet
from rankwise.recipes.predicting.saved import open_adapter
from rankwise.recipes.preparing import preparing
from rankwise.recipes.run import evaluate_with
from rankwise.recipes.samples import write_samples
from rankwise.recipes.tasks import Metric, load_task
from rankwise.recipes.training import training_arguments

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Measured:
    """The result of `evaluate`.

    Args:
        adapter: the adapter's folder.
        file: the data.
        examples: the number of evaluated examples, without those that can't be used.
        values: the values of the metrics, by key.
        metrics: the metrics' titles and formats.
        notes: notes for the user about the data, one sentence each.
        details: details behind the metrics (see `rankwise.recipes.details`). None: the task has none.
        samples: texts that the model writes for a few of the examples. Empty: the task has none.

    Example:
        >>> accuracy = Metric("accuracy", "accuracy", ".2%")
        >>> Measured("output/reviews", "new.csv", 100, {"accuracy": 0.9}, [accuracy], []).to_dict()["metrics"]
        {'accuracy': 0.9}
    """

    adapter: str
    file: str
    examples: int
    values: dict[str, float]
    metrics: Sequence[Metric]
    notes: Sequence[str]
    details: Mapping[str, Any] | None = None
    samples: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The result as data for JSON."""
        return {
            "adapter": self.adapter,
            "file": self.file,
            "examples": self.examples,
            "metrics": self.values,
            "notes": list(self.notes),
            "details": self.details,
            "samples": list(self.samples),
        }

    def table(self) -> Any:
        """The metrics as a table of ``rich``."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
        for metric in self.metrics:
            table.add_row(metric.title, f"[bold]{self.values[metric.key]:{metric.style}}[/]")
        return table


def evaluate(
    adapter: str | Path,
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    recipe: str | Path | None = None,
    batch_size: int | None = None,
    console: Console | None = None,
) -> Measured:
    r"""Measure an adapter on new data with its task's metrics, as ``rankwise train`` does on held-out data.

    Args:
        adapter: the adapter's folder, written by ``rankwise train`` or by PEFT.
        file: the data, with the columns that the adapter was trained on.
        overrides: ``key=value`` strings for the recipe in the folder.
        recipe: a recipe to use instead of the folder's.
        batch_size: the number of examples per batch. None: the recipe's.
        console: the console that shows the progress. None: the standard error.

    Returns:
        The metrics, with details and samples where the task has them.

    Raises:
        RecipeError: the folder, the data or the model can't be used.

    Example:
        >>> import tempfile
        >>> from rich.console import Console
        >>> from rankwise.recipes import load_recipe, train
        >>> quietly = Console(quiet=True)
        >>> small = ["data.train_size=32", "data.held_out=16", "training.max_steps=2", f"output={tempfile.mkdtemp()}"]
        >>> adapter = train(load_recipe("recipes/quickstart.yaml", small), console=quietly).folder
        >>> file = adapter / "new.csv"
        >>> _ = file.write_text("text,label\nShares fell in Tokyo.,business\nThe striker scored twice.,sports\n")
        >>> measured = evaluate(adapter, file, console=quietly)
        >>> measured.examples, sorted(measured.values)
        (2, ['accuracy', 'loss', 'macro_f1'])
    """
    from rich.console import Console
    from transformers import PrinterCallback

    from rankwise.recipes.progress import LiveProgress
    from rankwise.recipes.trainer import RecipeTrainer

    console = console or Console(stderr=True)
    size = [] if batch_size is None else [f"training.per_device_eval_batch_size={batch_size}"]
    with quiet():
        saved = open_adapter(adapter, str(file), [*overrides, *size], recipe)
        task = load_task(saved.recipe.task)
        with preparing(console, "reading the data"):
            data = task.read_data(saved.recipe)
            processor = task.processor(saved.recipe)
            notes = list(data.notes)
            model = saved.model(processor, notes)
            for_task, more = task.trainer_arguments(saved.recipe, data, processor, model)
        trainer_class = for_task.pop("trainer", RecipeTrainer)
        seen = Keep(for_task["compute_metrics"])
        for_task["compute_metrics"] = seen
        metrics = task.metrics(saved.recipe)
        with tempfile.TemporaryDirectory() as nowhere, LiveProgress(console, []) as progress:
            arguments = training_arguments(saved.recipe, 1, Path(nowhere), trainer_class)
            trainer = trainer_class(model=model, args=arguments, callbacks=[progress], **for_task)
            trainer.remove_callback(PrinterCallback)
            values = evaluate_with(trainer, metrics, for_task["eval_dataset"])
        behind = details_of(saved.recipe, data, processor, for_task["eval_dataset"], seen.prediction)
        samples = write_samples(saved.recipe, data, processor, model)
    shown = [metric for metric in metrics if metric.key in values]
    return Measured(
        str(adapter), str(file), len(data.evaluation), values, shown, [*notes, *more], behind, samples
    )
