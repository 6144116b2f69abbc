"""Splitting and ordering examples. Splits are the same on every machine, and keep the proportions of labels."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any


def mixed_order(labels: Sequence[Hashable], seed: int) -> list[int]:
    """An order of the rows in which every stretch holds each label in about its overall proportion.

    The rows of each label are shuffled. Then the i-th of a label's n rows is placed at (i + 1/2) / n of the whole.

    Args:
        labels: the label of each row. Equal labels give a plain shuffle.
        seed: the random seed of the shuffle.

    Example:
        >>> order = mixed_order(["a"] * 6 + ["b"] * 3, seed=0)
        >>> sorted(order) == list(range(9)), ["aaaaaabbb"[i] for i in order[:3]].count("b")
        (True, 1)
    """
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    count = Counter(labels)
    seen: Counter[Hashable] = Counter()
    place = {}
    for row in order:
        place[row] = (seen[labels[row]] + 0.5) / count[labels[row]]
        seen[labels[row]] += 1
    return sorted(order, key=place.__getitem__)


def shortest_first(examples: Any, column: str = "input_ids") -> Any:
    """Sort a dataset by length, so that batches hold little padding. For evaluation, where order does not matter."""
    lengths = list(map(len, examples[column]))
    return examples.select(sorted(range(len(lengths)), key=lengths.__getitem__))


def some_examples(examples: Any, most: int | None) -> Any:
    """At most ``most`` of a dataset's examples, spread evenly over all. ``most`` None: all examples.

    Example:
        >>> list(some_examples(range(10), 4)), some_examples(range(3), None)
        ([0, 2, 5, 7], range(0, 3))
    """
    count = len(examples)
    if most is None or count <= most:
        return examples
    chosen = [at * count // most for at in range(most)]
    if hasattr(examples, "select"):
        return examples.select(chosen)
    from torch.utils.data import Subset

    return Subset(examples, chosen)


def split_sizes(rows: int, held_out: float | int | str, train_size: int | None) -> tuple[int, int]:
    """The number of training rows and the number of held-out rows.

    Args:
        rows: the number of rows.
        held_out: a fraction (float below 1), a number of rows (int), or ``"rest"`` for all rows that do not train.
        train_size: the number of rows to train on. None: all rows that are not held out.

    Raises:
        ValueError: there are not enough rows.

    Example:
        >>> split_sizes(1000, 0.1, None), split_sizes(1000, "rest", 200), split_sizes(1000, 300, 200)
        ((900, 100), (200, 800), (200, 300))
    """
    if held_out == "rest":
        if train_size is None:
            raise ValueError("`held_out: rest` needs `train_size`: how many rows train.")
        held = rows - train_size
    else:
        held = max(1, round(rows * held_out)) if isinstance(held_out, float) else int(held_out)
    train = rows - held if train_size is None else train_size
    if train < 1 or held < 1 or train + held > rows:
        wanted = f"`held_out` takes {held}" if held > 0 else "nothing is left to hold out"
        if train_size is not None:
            wanted += f", and `train_size` {train_size}"
        there = "There is 1 row" if rows == 1 else f"There are {rows} rows"
        raise ValueError(
            f"{there}: {wanted}. At least 1 must train and at least 1 be held out. Change `train_size` or `held_out`."
        )
    return train, held
