"""Which rows hold the same texts or the same file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

_File = tuple[int, Path | str]  # the size in bytes, and the path or the digest of the contents


def keys_of_rows(unique: str | Sequence[str], *sets: Any) -> list[list[Hashable]]:
    """A key for each row of each dataset. Rows with the same texts, or with the same file, have equal keys.

    Args:
        unique: the columns with the texts, in which white space does not count; or the name of the column with the
            files, as paths or contents. Two files are the same if their contents are.
        sets: the datasets.
    """
    if isinstance(unique, str):
        return [list(keys) for keys in _keys_of_files([list(map(_file, rows[unique])) for rows in sets])]
    return [
        [tuple(map(_plain, parts)) for parts in zip(*(rows[column] for column in unique), strict=True)]
        for rows in sets
    ]


def _plain(value: Any) -> str:
    """A value to compare, without differences in white space."""
    return " ".join(value.split()) if isinstance(value, str) else repr(value)


def _file(value: Any) -> _File:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return len(value), _digest(value)
    path = Path(value).resolve()
    return path.stat().st_size, path


def _keys_of_files(sets: Sequence[Sequence[_File]]) -> list[list[_File]]:
    """The sizes and digests of files. A file whose size no other file has keeps its path, and is not read."""
    sizes = Counter(size for size, _ in set(chain.from_iterable(sets)))
    known: dict[_File, _File] = {}

    def key(file: _File) -> _File:
        if file not in known:
            size, name = file
            if isinstance(name, Path) and sizes[size] > 1:
                name = _digest(name.read_bytes())
            known[file] = size, name
        return known[file]

    return [list(map(key, files)) for files in sets]


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()
