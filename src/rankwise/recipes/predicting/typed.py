"""Writing texts from the command line or the standard input to a file to predict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.recipes.errors import RecipeError, refusal
from rankwise.recipes.predicting.saved import open_adapter


def write_typed(
    texts: Sequence[str],
    folder: Path,
    adapter: str | Path,
    overrides: Sequence[str],
    recipe: str | Path | None,
) -> Path:
    """Write texts as JSON lines, in the column that the adapter's recipe reads.

    Args:
        texts: one text for each row. Words to tag are separated by spaces.
        folder: the folder to write to.
        adapter: the adapter's folder.
        overrides: ``key=value`` strings for the adapter's recipe.
        recipe: a recipe to use instead of the folder's.

    Returns:
        The file.

    Raises:
        RecipeError: the adapter does not read single texts, or a text is empty.
    """
    if not texts or not all(text.strip() for text in texts):
        raise RecipeError("There is an empty text. Give a text to predict." if texts else "There is no text.")
    data: Any = open_adapter(adapter, str(adapter), overrides, recipe, truth_needed=False).recipe
    task, section = data.task, data.data
    if task == "text-classification" and section.text_pair is None:
        rows: list[Any] = [{section.text: text} for text in texts]
    elif task == "token-classification":
        rows = [{section.tokens: text.split()} for text in texts]
    elif task == "causal-lm" and section.messages is not None:
        rows = [{section.messages: [{"role": "user", "content": text}]} for text in texts]
    elif task == "causal-lm":
        rows = [{section.prompt or section.text or "text": text} for text in texts]
    else:
        what = "pairs of texts" if task == "text-classification" else "files"
        raise refusal("--text", f"this adapter reads {what}. Give a FILE.")
    path = folder / "typed.jsonl"
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path
