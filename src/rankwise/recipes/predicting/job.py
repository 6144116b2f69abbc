"""A job of predicting rows: the rows, the model and the batches. All kinds of predictions use it."""

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
    """Rows to predict, and the model to predict them with.

    Args:
        saved: the adapter's folder and recipe.
        table: the rows, with the columns that the task reads.
        model: the model with its adapter, on its device.
        processor: the task's tokenizer, feature extractor or image processor.
        batch_size: the number of examples per batch.
        max_new_tokens: the most tokens that a model writes per example. None: the recipe's number.
        notes: notes for the user, one sentence each.
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
        """The recipe, as an instance of the task's class."""
        return self.saved.recipe

    def run(
        self, items: Sequence[Item], sizes: Sequence[int], predict: Callable[[list[Item]], Sequence[Found]]
    ) -> list[Found]:
        """Predict items in batches of similar sizes.

        Args:
            items: the items to predict.
            sizes: the size of each item. Similar sizes in a batch save padding.
            predict: a function that returns a result for each item of a batch.

        Returns:
            The results, in the order of ``items``.
        """
        import torch

        # The largest items come first, so that a lack of memory shows at once.
        order = sorted(range(len(items)), key=lambda i: -sizes[i])
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        found: dict[int, Found] = {}
        with torch.no_grad(), precision(self.recipe, self.model.device):
            for batch in tracked(batches, "predicting", len(batches)):
                found.update(zip(batch, predict([items[i] for i in batch]), strict=True))
        return [found[i] for i in range(len(items))]

    def spread(self, rows: Sequence[int], results: Sequence[Found]) -> list[Found | None]:
        """A list with the results of ``rows`` for all rows of the table, with None for other rows."""
        at = dict(zip(rows, results, strict=True))
        return [at.get(row) for row in range(len(self.table.rows))]

    def note_skipped(self, rows: Sequence[int], why: str) -> None:
        """Note which rows get no prediction."""
        if rows:
            self.notes.append(
                f"{count_rows(len(rows))} {why}: no prediction ({listed_rows(self.table, rows)})."
            )

    def usable_texts(self, column: str) -> list[int]:
        """The numbers of the rows with a text. A note lists the others."""
        values = self.table.rows[column]
        rows = [row for row, text in enumerate(values) if isinstance(text, str) and text.strip()]
        self.note_skipped(sorted(set(range(len(values))) - set(rows)), f"without text in {column!r}")
        return rows


@contextlib.contextmanager
def precision(recipe: BaseRecipe, device: Any) -> Iterator[None]:
    """A context with the recipe's mixed precision. On the CPU it has no effect."""
    import torch

    training = recipe.training
    if device.type == "cpu" or not (training.bf16 or training.fp16):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16 if training.bf16 else torch.float16):
        yield


def likeliest(logits: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The likeliest label, its probability and all labels' probabilities, for each row of logits (n, labels)."""
    chances = logits.float().softmax(dim=-1)
    for row, best in zip(chances.tolist(), chances.argmax(dim=-1).tolist(), strict=True):
        yield {
            "": names[best],
            "score": row[best],
            **{f"probability_{n}": p for n, p in zip(names, row, strict=True)},
        }
