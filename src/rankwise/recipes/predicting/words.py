"""Predicting a tag for each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankwise.recipes.data.rows import bad_rows
from rankwise.recipes.errors import raise_problems
from rankwise.recipes.models import token_limit
from rankwise.recipes.predicting.job import Job


def columns(recipe: Any) -> dict[str, str]:
    """The name of the column to read, by its key in the recipe."""
    return {"data.tokens": recipe.data.tokens}


def predict(job: Job) -> list[dict[str, Any] | None]:
    """A list of tags for each row, one tag for each word. Long sentences are read in parts."""
    rows = _rows_with_words(job)
    sentences = list(job.table.rows.select(rows)[job.recipe.data.tokens])
    limit = token_limit(job.recipe.data.max_length, job.processor, job.model.config)
    parts = [part for sentence, words in enumerate(sentences) for part in _parts(job, sentence, words, limit)]
    names = job.saved.labels or ()

    def of_batch(batch: list[dict[str, Any]]) -> Sequence[list[tuple[int, str]]]:
        inputs = [{"input_ids": part["input_ids"]} for part in batch]
        padded = job.processor.pad(inputs, return_tensors="pt").to(job.model.device)
        found = job.model(**padded).logits.argmax(dim=-1).tolist()
        return [
            [(word, names[tags[at]]) for word, at in part["first"].items()]
            for part, tags in zip(batch, found, strict=True)
        ]

    tags: list[list[str | None]] = [[None] * len(words) for words in sentences]
    results = job.run(parts, [len(part["input_ids"]) for part in parts], of_batch)
    for part, found in zip(parts, results, strict=True):
        for word, tag in found:
            # A word that two parts share gets its tag from the part where it begins.
            tags[part["sentence"]][word] = tags[part["sentence"]][word] or tag
    return job.spread(rows, [{"": each} for each in tags])


def _rows_with_words(job: Job) -> list[int]:
    column = job.recipe.data.tokens
    values = job.table.rows[column]
    wrong = [
        row
        for row, words in enumerate(values)
        if words is not None
        and not (isinstance(words, list) and all(isinstance(word, str) for word in words))
    ]
    raise_problems(
        bad_rows(
            "data.tokens",
            job.table,
            wrong,
            lambda row: f"{column!r}: a list of words is expected, but it holds {values[row]!r:.50}",
        )
    )
    empty = [row for row, words in enumerate(values) if not words]
    job.note_skipped(empty, f"without words in {column!r}")
    return [row for row, words in enumerate(values) if words]


def _parts(job: Job, sentence: int, words: list[str], limit: int) -> list[dict[str, Any]]:
    """The parts of a sentence that fit the model's length: their tokens, and the position where each word begins."""
    encoded = job.processor(
        words, is_split_into_words=True, truncation=True, max_length=limit, return_overflowing_tokens=True
    )
    parts = []
    for number, ids in enumerate(encoded["input_ids"]):
        first: dict[int, int] = {}
        for at, word in enumerate(encoded.word_ids(number)):
            if word is not None:
                first.setdefault(word, at)
        parts.append({"sentence": sentence, "input_ids": ids, "first": first})
    return parts
