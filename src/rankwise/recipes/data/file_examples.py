"""Examples whose files are decoded one by one, when they are needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from rankwise.recipes.data.files import source_of


class FileExamples(Dataset[dict[str, Any]]):
    """A dataset of examples, each with a decoded file.

    If a file can't be decoded although its header could be read, the next file replaces it, with a warning.

    Args:
        rows: a ``datasets.Dataset`` with a column of paths or contents, and the column ``labels``.
        column: the name of the column with the files.
        decode: a function that decodes a path or contents. It raises a ValueError for files that it can't decode.
        name: the key of the decoded file in an example. It must be an argument of the model's forward, because
            Transformers' Trainer removes other keys.
        strict: whether to raise an error instead of taking the next file.
    """

    def __init__(
        self, rows: Any, column: str, decode: Callable[[str | bytes], Any], name: str, *, strict: bool
    ) -> None:
        self.rows = rows
        self.column = column
        self.decode = decode
        self.name = name
        self.strict = strict

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        for step in range(len(self)):
            row = self.rows[(index + step) % len(self)]
            source = source_of(row[self.column]) or b""
            try:
                return {self.name: self.decode(source), "labels": row["labels"]}
            except ValueError as error:
                file = source if isinstance(source, str) else f"file {index + step + 1}"
                if self.strict:
                    raise type(error)(f"{file!r} {error}") from error
                warnings.warn(f"{file!r} {error}; the next file takes its place.", stacklevel=2)
        raise ValueError(f"None of the {len(self)} files can be decoded.")
