"""The labels of examples: their texts in a column, their names in order, and their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rankwise.recipes.data.rows import bad_rows
from rankwise.recipes.data.tables import Table
from rankwise.recipes.errors import did_you_mean, raise_problems, refusal

# The label of a token that is read but not learned. PyTorch's cross entropy ignores it.
IGNORED = -100


def label_words(table: Table, column: str, rows: Sequence[int]) -> list[str]:
    """The label of each of ``rows``, as text.

    Raises:
        RecipeError: a row has no label, or several.
    """
    values = table.rows[column]
    several = [row for row in rows if isinstance(values[row], (list, dict))]
    raise_problems(
        bad_rows(
            "data.label",
            table,
            several,
            lambda row: f"holds {values[row]!r:.50} in {column!r}, where one label is expected",
        )
    )
    names = getattr(table.rows.features[column], "names", None)
    words = [_word(values[row], names) for row in rows]
    missing = [row for row, word in zip(rows, words, strict=True) if word is None]
    raise_problems(bad_rows("data.label", table, missing, lambda row: f"has no label in {column!r}"))
    return [word for word in words if word is not None]


def _word(value: Any, names: Sequence[str] | None) -> str | None:
    """A label as text, or None if there is no label."""
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        return None if math.isnan(value) else str(int(value))
    return None if value is None or not str(value).strip() else str(value).strip()


def too_many(words: Sequence[str]) -> bool:
    """Whether ``words`` have too many different values to be labels."""
    return len(set(words)) > max(20, len(words) // 2)


def label_names(
    wanted: Sequence[str | int] | None, table: Table, column: str, words: Sequence[str]
) -> list[str]:
    """The names of the labels, in the order of their numbers.

    Args:
        wanted: the recipe's ``data.labels``. None: the labels in the data, sorted (whole numbers by value).
        table: the training data.
        column: the column with the labels.
        words: the label of each example, as text.

    Raises:
        RecipeError: a name occurs twice in ``wanted``, there is only one label, or there are too many to be labels.
    """
    if wanted:
        names = [str(name) for name in wanted]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise refusal("data.labels", f"{twice!r} appears twice.")
        return names
    named = getattr(table.rows.features[column], "names", None)
    names = list(named or set(words))
    if not named:
        names.sort(key=(lambda name: (int(name), name)) if all(map(_is_whole, names)) else None)
    if len(names) < 2:
        raise refusal(
            "data.label", f"{table.place.name} has only the label {names[0]!r} in {column!r}: two are needed."
        )
    if not named and too_many(words):
        raise refusal(
            "data.label",
            f"{table.place.name} has {len(names)} different labels in {column!r} for {len(words)} examples, such as "
            f"{words[0]!r:.50}. Name the column with the labels; if it is this one, list them in `data.labels`.",
        )
    return names


def label_numbers(table: Table, rows: Sequence[int], words: Sequence[str], names: Sequence[str]) -> list[int]:
    """The number of each row's label.

    Raises:
        RecipeError: a label is not in ``names``.
    """
    number = {name: i for i, name in enumerate(names)}
    unknown = {row: word for row, word in zip(rows, words, strict=True) if word not in number}
    raise_problems(
        bad_rows(
            "data.label",
            table,
            list(unknown),
            lambda row: f"has the unknown label {unknown[row]!r}. {did_you_mean(unknown[row], names)}",
        )
    )
    return [number[word] for word in words]


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
