"""Predicting every row of a file with an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.recipes.data.conll import is_conll, read_conll
from rankwise.recipes.data.files import Kind, files_problems, read_files, shown_path
from rankwise.recipes.data.tables import Table, column_problems, quiet_datasets, read_table, read_text_files
from rankwise.recipes.errors import RecipeError, raise_problems, refusal
from rankwise.recipes.models import quiet
from rankwise.recipes.places import find_place
from rankwise.recipes.predicting import files, texts, words, writing
from rankwise.recipes.predicting.job import Job
from rankwise.recipes.predicting.saved import SavedAdapter, name_columns, open_adapter
from rankwise.recipes.preparing import preparing
from rankwise.recipes.tasks import load_task
from rankwise.recipes.training import device_of

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class _Way:
    """The way a task predicts: the columns to read, the function, and the kind of files if it reads files."""

    columns: Callable[[Any], dict[str, str]]
    predict: Callable[[Job], list[dict[str, Any] | None]]
    kind: Kind | None = None


_WAYS: Mapping[str, _Way] = {
    "text-classification": _Way(texts.columns, texts.predict),
    "token-classification": _Way(words.columns, words.predict),
    "causal-lm": _Way(writing.columns, writing.predict),
    "image-classification": _Way(files.picture_columns, files.label_pictures, files.PICTURES),
    "speech-recognition": _Way(files.clip_columns, files.write_down, files.CLIPS),
}


@dataclass(frozen=True)
class Predictions:
    """The result of `predict`.

    Args:
        columns: the data's own columns, then the predictions. All have the same length.
        notes: notes for the user, one sentence each.

    Example:
        >>> found = Predictions({"text": ["good", "bad"], "prediction": ["positive", "negative"]}, notes=[])
        >>> found.rows()[1]
        {'text': 'bad', 'prediction': 'negative'}
    """

    columns: Mapping[str, Sequence[Any]]
    notes: Sequence[str]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary for each row, in the data's order."""
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]


def predict(
    adapter: str | Path,
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    recipe: str | Path | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    probabilities: bool = False,
    column: str = "prediction",
    console: Console | None = None,
) -> Predictions:
    r"""Predict every row of a file. The file needs no column of labels.

    Args:
        adapter: the adapter's folder, written by ``rankwise train`` or by PEFT.
        file: a table, or a folder of files.
        overrides: ``key=value`` strings for the recipe in the folder, such as ``data.text=review``.
        recipe: a recipe to use instead of the folder's.
        batch_size: the number of examples per batch. None: the recipe's batch size in evaluation.
        max_new_tokens: the most tokens that a model writes per example. None: the recipe's number.
        probabilities: whether to add a column with the probability of each label.
        column: the name of the new column. The column ``<column>_score`` holds the predicted label's probability.
        console: the console that shows the progress. None: the standard error.

    Returns:
        The file's columns and the predictions. Rows that can't be predicted have None.

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
        >>> _ = file.write_text("text\nShares fell in Tokyo.\nThe striker scored twice.\n")
        >>> rows = predict(adapter, file, console=quietly).rows()
        >>> len(rows), list(rows[0])
        (2, ['text', 'prediction', 'prediction_score'])
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    with quiet(), quiet_datasets():
        saved = open_adapter(adapter, str(file), overrides, recipe, truth_needed=False)
        own: Any = saved.recipe
        with preparing(console, "reading the data"):
            table, shown = _read(saved, _WAYS[own.task])
            _check_free(column, shown)
            processor = load_task(own.task).processor(own)
            notes = list(table.notes)
            model = saved.model(processor, notes)
        size = own.training.per_device_eval_batch_size if batch_size is None else batch_size
        job = Job(saved, table, model.to(device_of(own)), processor, size, max_new_tokens, notes)
        with preparing(console, "predicting"):
            found = _WAYS[own.task].predict(job)
    if not any(found):
        raise refusal(str(file), f"no row can be predicted. {' '.join(job.notes)}")
    return Predictions({**shown, **_columns(found, column, probabilities)}, job.notes)


def _columns(
    found: Sequence[dict[str, Any] | None], column: str, probabilities: bool
) -> dict[str, list[Any]]:
    """The columns of predictions. Their names are ``column``, and ``column`` with an ending for scores."""
    names = next(list(row) for row in found if row is not None)
    kept = [name for name in names if probabilities or not name.startswith("probability_")]
    return {
        f"{column}_{name}" if name else column: [None if row is None else row[name] for row in found]
        for name in kept
    }


def _check_free(column: str, shown: Mapping[str, Any]) -> None:
    taken = [name for name in shown if name == column or name.startswith(f"{column}_")]
    if taken:
        raise RecipeError(
            f"The data has a column {taken[0]!r} already. Give the predictions another name, with --column NAME."
        )


# --- reading -----------------------------------------------------------------------------------------------------


def _read(saved: SavedAdapter, way: _Way) -> tuple[Table, dict[str, Sequence[Any]]]:
    """Read the rows to predict, and the columns to return with the predictions.

    Raises:
        RecipeError: the file can't be read, or lacks a column.
    """
    recipe: Any = saved.recipe
    place = find_place(recipe.data.train, "FILE", recipe.folder)
    wanted = way.columns(recipe)
    source = (place, "FILE", list(wanted.values()), recipe.data.train_split, recipe.data.subset)
    if way.kind is not None:
        raise_problems(name_columns(files_problems(way.kind, place, "FILE", wanted)))
        table = read_files(way.kind, *source, rest=True)
        first, *rest = table.rows.column_names
        names = [_file_name(value, row, table) for row, value in enumerate(table.rows[first])]
        return table, {first: names, **{name: list(table.rows[name]) for name in rest}}
    if place.path is not None and place.path.is_dir() and len(wanted) == 1:
        table = read_text_files(place, "FILE", *wanted.values())
        return table, {"file": list(table.files)}
    if recipe.task == "token-classification" and is_conll(place):
        table = read_conll(place, "FILE", recipe.data.tokens, recipe.data.tags)
    else:
        raise_problems(name_columns(column_problems(place, "FILE", wanted)))
        table = read_table(*source, rest=True)
    return table, {name: list(table.rows[name]) for name in table.rows.column_names}


def _file_name(value: Any, row: int, table: Table) -> str:
    """The name to show for a file: its path from the table's folder, or the number of its row."""
    path = value.get("path") if isinstance(value, dict) else value
    return shown_path(path, table) if isinstance(path, str) and path else f"row {row + 1}"
