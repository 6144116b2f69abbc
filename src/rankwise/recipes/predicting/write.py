"""Writing a table of predictions as CSV or JSON lines. An incomplete file is never left behind."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.files.atomic import write_file
from rankwise.recipes.errors import refusal

_SEPARATOR = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson", ".json")


def check_free(
    path: Path, endings: Sequence[str], *, overwrite: bool, reads: Sequence[str | Path] = ()
) -> None:
    """Refuse a file that can't be written, before the work begins.

    Args:
        path: the file to write.
        endings: the endings that the file may have.
        overwrite: whether the file may exist.
        reads: files that the command reads, and so must not overwrite.

    Raises:
        RecipeError: the file can't be written. The message says why.
    """
    name = str(path)
    if path.suffix.lower() not in endings:
        raise refusal(name, f"its ending says the format: give {', '.join(endings)}.")
    if not path.parent.is_dir():
        raise refusal(name, f"there is no folder {str(path.parent)!r}. Make it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise refusal(name, f"can't be written: {str(path.parent)!r} is read-only. Give another place.")
    if path.is_dir():
        raise refusal(name, "is a folder. Give the name of a file.")
    if any(path.exists() and Path(read).exists() and path.samefile(read) for read in reads):
        raise refusal(name, "is read by this very command. Give another name.")
    if path.exists() and not overwrite:
        raise refusal(name, "is there already. To replace it, add --overwrite.")


TABLE_ENDINGS = (*_SEPARATOR, *_LINES)


def write_table(columns: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Write columns of the same length to a file of one of `TABLE_ENDINGS`.

    In CSV, lists and objects are written as JSON, and None as an empty cell.

    Args:
        columns: the values of each column, by name.
        path: the file to write.

    Raises:
        OSError: the file can't be written. An earlier file stays unchanged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "found.csv"
        >>> write_table({"text": ["good film", "bad, bad"], "prediction": ["pos", None]}, path)
        >>> print(path.read_text())
        text,prediction
        good film,pos
        "bad, bad",
        <BLANKLINE>
    """
    rows = zip(*columns.values(), strict=True)
    if path.suffix.lower() in _LINES:
        write_file(path, "".join(f"{json_line(dict(zip(columns, row, strict=True)))}\n" for row in rows))
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=_SEPARATOR[path.suffix.lower()], lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    write_file(path, text.getvalue())


def json_line(row: Mapping[str, Any], *, only_ascii: bool = False) -> str:
    """A row as a line of JSON. Values that JSON can't hold, such as dates, are written as text."""
    known = {name: _known(value) for name, value in row.items()}
    return json.dumps(known, ensure_ascii=only_ascii, default=str)


def _cell(value: Any) -> Any:
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


def _known(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
