"""What every kind of prediction shares: the rows, the batches, and where they run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rankwise.recipes.data.rows import count_rows, listed_rows
from rankwise.recipes.data.tables import Table
from rankwise.recipes.predicting.saved import SavedAdapter
from rankwise.recipes.preparing import tracked
from rankwise.recipes.recipe import BaseRecipe

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass
class Job:
    """Rows to predict, and the model that does it.

    Args:
        saved: the adapter's folder and recipe.
        table: the rows, with the columns that the task reads.
        model: with its adapter, on its device.
        processor: the task's.
        batch_size: examples at a time.
        max_new_tokens: that a model which writes may write; None for the recipe's number.
        notes: what the user should know, a sentence each.
    """

    saved: SavedAdapter
    table: Table
    model: Any
    processor: Any
    batch_size: int
    max_new_tokens: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> Any:
        """The recipe, of the task's own class."""
        return self.saved.recipe

    def run(
        self, items: Sequence[Item], sizes: Sequence[int], predict: Callable[[list[Item]], Sequence[Found]]
    ) -> list[Found]:
        """Predict items in batches of like size, and put the results back in the items' order.

        Args:
            items: what ``predict`` takes a list of.
            sizes: the size of each: batches of one size hold little padding.
            predict: gives a result for each item of a batch.
        """
        import torch

        order = sorted(
            range(len(items)), key=lambda i: -sizes[i]
        )  # the largest first: what won't fit shows at once
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        found: dict[int, Found] = {}
        with torch.no_grad(), precision(self.recipe, self.model.device):
            for batch in tracked(batches, "predicting", len(batches)):
                found.update(zip(batch, predict([items[i] for i in batch]), strict=True))
        return [found[i] for i in range(len(items))]

    def spread(self, rows: Sequence[int], results: Sequence[Found]) -> list[Found | None]:
        """The results of ``rows`` among all rows of the table; None for the others."""
        at = dict(zip(rows, results, strict=True))
        return [at.get(row) for row in range(len(self.table.rows))]

    def note_skipped(self, rows: Sequence[int], why: str) -> None:
        """Say which rows get no prediction."""
        if rows:
            self.notes.append(
                f"{count_rows(len(rows))} {why}: no prediction ({listed_rows(self.table, rows)})."
            )

    def usable_texts(self, column: str) -> list[int]:
        """The rows with a text; the others are noted."""
        values = self.table.rows[column]
        rows = [row for row, text in enumerate(values) if isinstance(text, str) and text.strip()]
        self.note_skipped(sorted(set(range(len(values))) - set(rows)), f"without text in {column!r}")
        return rows


@contextlib.contextmanager
def precision(recipe: BaseRecipe, device: Any) -> Iterator[None]:
    """The mixed precision that the recipe trains in, where the device is one that trains."""
    import torch

    training = recipe.training
    if device.type == "cpu" or not (training.bf16 or training.fp16):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16 if training.bf16 else torch.float16):
        yield


def likeliest(logits: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """For each row of logits (n, labels) the likeliest label, how likely it is, and how likely each one is."""
    chances = logits.float().softmax(dim=-1)
    for row, best in zip(chances.tolist(), chances.argmax(dim=-1).tolist(), strict=True):
        yield {
            "": names[best],
            "score": row[best],
            **{f"probability_{n}": p for n, p in zip(names, row, strict=True)},
        }
