"""Predicting labels or numbers for texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankwise.recipes.data.rows import second_texts
from rankwise.recipes.models import token_limit
from rankwise.recipes.predicting.job import Job, likeliest


def columns(recipe: Any) -> dict[str, str]:
    """The names of the columns to read, by their keys in the recipe."""
    return {key: name for key, name in recipe.data.columns.items() if key != "data.label"}


def predict(job: Job) -> list[dict[str, Any] | None]:
    """The label, its probability and all labels' probabilities, for each row. In regression, the number."""
    data, rows = job.recipe.data, job.usable_texts(job.recipe.data.text)
    texts = list(job.table.rows.select(rows)[data.text])
    pairs = [] if data.text_pair is None else [second_texts(job.table, data.text_pair, rows)]
    limit = token_limit(data.max_length, job.processor, job.model.config)
    encoded = job.processor(texts, *pairs, truncation=True, max_length=limit) if texts else {}
    examples = [{name: encoded[name][i] for name in encoded} for i in range(len(texts))]
    sizes = [len(example["input_ids"]) for example in examples]
    cut = sum(size >= limit for size in sizes)
    if cut:
        job.notes.append(
            f"{cut:,} of {len(rows):,} texts reach {limit} tokens; the rest of each is not read."
        )

    def of_batch(batch: list[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        inputs = job.processor.pad(batch, return_tensors="pt").to(job.model.device)
        logits = job.model(**inputs).logits
        if job.saved.labels is None:
            return [{"": value} for value in logits.float().reshape(-1).tolist()]
        return list(likeliest(logits, job.saved.labels))

    return job.spread(rows, job.run(examples, sizes, of_batch))
