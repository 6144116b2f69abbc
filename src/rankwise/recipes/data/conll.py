"""Reading CoNLL files: each line has a word and, in its last column, a tag. A blank line ends a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rankwise.recipes.data.tables import Table
from rankwise.recipes.errors import refusal
from rankwise.recipes.places import Place

SUFFIXES = (".conll", ".iob", ".iob2", ".bio")
_BOUNDARY = "-DOCSTART-"  # the line between documents in CoNLL-2003


def is_conll(place: Place) -> bool:
    """Whether a place is a CoNLL file, by its ending."""
    return place.path is not None and place.path.is_file() and place.path.suffix.lower() in SUFFIXES


def read_conll(place: Place, key: str, tokens: str, tags: str) -> Table:
    """Read the sentences of a file.

    Args:
        place: the file.
        key: the file's key in the recipe, for messages.
        tokens: the name for the column of words.
        tags: the name for the column of tags.

    Raises:
        RecipeError: the file can't be read, a line has no tag, or there is no sentence.
    """
    import datasets

    path = place.path or Path()
    try:
        sentences = list(_sentences(path))
    except (OSError, UnicodeDecodeError) as error:
        raise refusal(key, f"{place.name!r} can't be read as UTF-8 text: {error}") from error
    except ValueError as error:
        raise refusal(key, str(error)) from error
    if not sentences:
        raise refusal(key, f"{place.name!r} has no sentences.")
    rows = {tokens: [words for _, words, _ in sentences], tags: [marks for _, _, marks in sentences]}
    lines = [f"{path.name}, line {line}" for line, _, _ in sentences]
    return Table(place, datasets.Dataset.from_dict(rows), lines)


def _sentences(path: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """The sentences. Each is the number of its first line, its words and its tags."""
    first = 0
    words: list[str] = []
    tags: list[str] = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
            cells = [cell.strip() for cell in cells]
            is_comment = not words and line.startswith("# ") and "=" in line
            if is_comment or (cells and cells[0] == _BOUNDARY):
                continue
            if not any(cells):
                if words:
                    yield first, words, tags
                first, words, tags = 0, [], []
                continue
            if len(cells) < 2 or not cells[-1]:
                raise ValueError(
                    f"{path.name}, line {number}: a word and its tag are expected, not {line.strip()!r:.50}."
                )
            first = first or number
            words.append(cells[0])
            tags.append(cells[-1])
    if words:
        yield first, words, tags
