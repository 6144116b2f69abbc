"""Reading tables of text with ``datasets``: CSV, JSON lines, Parquet, a folder of class folders, or a hub name.

For messages, each row has a place that users can find, such as a file and a line.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.recipes.errors import Problem, RecipeError, did_you_mean, refusal
from rankwise.recipes.places import Place, refuse_unreachable

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
FOLDER_COLUMNS = ("text", "label")
_JSON_HEAD = 1000  # lines of a JSON file that tell its columns, because a row may lack some


@dataclass(frozen=True)
class Table:
    """The columns of a source that a task asked for.

    Args:
        place: the source.
        rows: the rows, a ``datasets.Dataset``.
        files: the file of each row, if the source is a folder.
        notes: notes for the user about the reading, one sentence each.
    """

    place: Place
    rows: Any
    files: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)

    def where(self, row: int) -> str:
        """The place of row ``row`` (from 0): ``reviews.csv, line 17``."""
        if self.files:
            return self.files[row]
        path = self.place.path
        kind = SUFFIXES.get(path.suffix.lower()) if path else None
        if path is not None and kind == "csv":
            return f"{path.name}, line {_nth(_csv_lines(path), row)}"
        if path is not None and kind == "json" and not _is_json_array(path):
            return f"{path.name}, line {_nth(_json_lines(path), row)}"
        return f"{path.name if path else self.place.name}, row {row + 1}"


def columns_of(place: Place, key: str) -> list[str] | None:
    """The names of a source's columns, read from its head. None: only reading the whole source can tell.

    Raises:
        RecipeError: the source is of an unknown kind, can't be read, or is empty.
    """
    path = place.path
    if path is None:
        return None
    if path.is_dir():
        _class_folders(path, key)
        return list(FOLDER_COLUMNS)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise refusal(
            key, f"{place.name!r} is a kind of file that can't be read. {_KINDS}, a folder, or a hub name."
        )
    try:
        columns = {"csv": _csv_columns, "json": _json_columns, "parquet": _parquet_columns}[kind](path)
    except (OSError, ValueError) as error:
        raise refusal(key, f"{place.name!r} can't be read as {kind}: {error}") from error
    if columns is not None and not columns:
        raise refusal(key, f"{place.name!r} is empty.")
    if not _has_rows(path, kind):
        named = f", only the names of its columns: {', '.join(columns[:20])}" if columns else ""
        raise refusal(key, f"{place.name!r} has no rows{named}.")
    return columns


def _has_rows(path: Path, kind: str) -> bool:
    """Whether a file has at least one row. Only the head of the file is read."""
    if kind == "csv":
        # Reading the rows will report these errors with their lines.
        with contextlib.suppress(csv.Error, UnicodeDecodeError):
            return next(_csv_lines(path), None) is not None
    if kind == "json" and _is_json_array(path):
        with open(path, encoding="utf-8-sig") as file:
            return re.fullmatch(r"\s*\[\s*\]?\s*", file.read(1000)) is None
    if kind == "parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows) > 0
    return True


_KINDS = f"Valid: {', '.join(SUFFIXES)}"


def column_problems(place: Place, key: str, wanted: dict[str, str]) -> Iterator[Problem]:
    """The problems with a source and its columns.

    Args:
        place: the source.
        key: the source's key in the recipe.
        wanted: the names of the columns, by their keys in the recipe, such as ``data.text``.
    """
    try:
        columns = columns_of(place, key)
    except RecipeError as error:
        yield from error.problems
        return
    for asking, name in wanted.items():
        if columns is not None and name not in columns:
            yield Problem(asking, missing_column(name, place, columns))


def missing_column(name: str, place: Place, columns: Sequence[str]) -> str:
    """The message about a column that is missing in a source."""
    shown = ", ".join(columns[:20])
    if len(columns) == 1 and (sign := next((sign for sign in ";\t|" if sign in columns[0]), None)):
        return (
            f"{_short(place)} has no column {name!r}: its columns are separated by {sign!r}, not by commas "
            f"({shown})."
        )
    return f"{_short(place)} has no column {name!r}; it has {shown}. {_only_near(name, columns)}".rstrip()


def _short(place: Place) -> str:
    return place.path.name if place.path else place.name


def _only_near(name: str, columns: Sequence[str]) -> str:
    hint = did_you_mean(name, columns)
    return hint if hint.startswith("Did") else ""


def read_table(
    place: Place,
    key: str,
    columns: Sequence[str],
    split: str,
    subset: str | None = None,
    *,
    rest: bool = False,
) -> Table:
    """Read columns of a source into memory.

    Args:
        place: the source.
        key: the source's key in the recipe, for messages.
        columns: the columns to keep.
        split: the split of a hub dataset.
        subset: the subset of a hub dataset with several subsets.
        rest: whether to keep all other columns, too.

    Raises:
        RecipeError: the source can't be read, is empty, or lacks a column.
    """
    if place.path is not None and place.path.is_dir():
        return _read_folder(place, key)
    refuse_unreachable(place, key, ("README.md", ".gitattributes"), kind="dataset")
    import datasets

    with tempfile.TemporaryDirectory(prefix="rankwise-data-") as cache, quiet_datasets():
        try:
            if place.path is None:
                rows = datasets.load_dataset(place.name, subset, split=split)
            else:
                rows = _load_file(datasets, place.path, cache)
        except Exception as error:
            raise refusal(key, _unreadable(place, error)) from error
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise RecipeError([Problem(key, missing_column(name, place, rows.column_names)) for name in missing])
    if len(rows) == 0:
        raise refusal(key, f"{place.name} has no rows.")
    return Table(place, rows if rest else rows.select_columns(list(dict.fromkeys(columns))))


def _load_file(datasets: Any, path: Path, cache: str) -> Any:
    """Read a file into memory. Its cache can then be deleted, so that a changed file is never read from a cache."""
    kind = SUFFIXES[path.suffix.lower()]
    options: dict[str, Any] = {}
    if kind == "csv":
        # Every cell is read as text, so that "NA" stays a word and 007 keeps its zeros.
        text = datasets.Features({name: datasets.Value("string") for name in _csv_columns(path)})
        options = {"features": text, "keep_default_na": False, "na_values": [""], "sep": _separator(path)}
    return datasets.load_dataset(
        kind, data_files=_literal(path), split="train", cache_dir=cache, keep_in_memory=True, **options
    )


def _literal(path: Path) -> str:
    """A glob pattern that matches only this path."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in str(path))


def _unreadable(place: Place, error: Exception) -> str:
    """The reason why ``datasets`` could not read a source, with the line where it is cheap to find."""
    path = place.path
    if path is None:
        return f"{place.name!r} is not a file or folder here, and it can't be loaded as a hub dataset: {_root(error)}"
    kind = SUFFIXES.get(path.suffix.lower())
    line = None
    with contextlib.suppress(OSError, ValueError, csv.Error):
        line = (
            _broken_json_line(path) if kind == "json" else _ragged_csv_line(path) if kind == "csv" else None
        )
    if line is not None:
        return f"{path.name}, line {line}"
    return f"{place.name} can't be read as {kind}: {_root(error)}"


def _root(error: BaseException) -> str:
    """The message of an error's innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence the progress bars and log lines of ``datasets``. Its exceptions say everything that matters."""
    import logging

    import datasets

    logger = logging.getLogger("datasets")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


# --- CSV ---------------------------------------------------------------------------------------------------------


def _separator(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows, each with the number of its first line. The header comes first. Blank lines are skipped."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=_separator(path))
        line = 1
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1


def _csv_columns(path: Path) -> list[str]:
    try:
        columns = next((cells for _, cells in _csv_rows(path)), [])
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error}). Save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(str(error)) from error
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the column {twice!r} appears twice")
    return columns


def _csv_lines(path: Path) -> Iterator[int]:
    rows = (line for line, _ in _csv_rows(path))
    next(rows, None)
    return rows


def _ragged_csv_line(path: Path) -> str | None:
    """The first row with more cells than there are columns."""
    rows = _csv_rows(path)
    _, columns = next(rows)
    for line, cells in rows:
        if len(cells) > len(columns):
            return f"{line}: {len(cells)} values for {len(columns)} columns. Put quotes around text with commas in it."
    return None


# --- JSON --------------------------------------------------------------------------------------------------------


def _json_columns(path: Path) -> list[str] | None:
    if _is_json_array(path):
        return None
    columns: dict[str, None] = {}
    with open(path, encoding="utf-8-sig") as file:
        for line in itertools.islice((line for line in file if line.strip()), _JSON_HEAD):
            try:
                row = json.loads(line)
            except ValueError:
                return None  # an object over several lines, or a broken line: only a whole read can tell
            if not isinstance(row, dict):
                if columns:
                    return None
                raise ValueError("each line must be an object, such as {" + '"text": "…", "label": "…"}')
            columns |= dict.fromkeys(row)
    return list(columns)


def _is_json_array(path: Path) -> bool:
    with open(path, encoding="utf-8-sig") as file:
        return file.read(1000).lstrip().startswith("[")


def _json_lines(path: Path) -> Iterator[int]:
    with open(path, encoding="utf-8-sig") as file:
        yield from (number for number, line in enumerate(file, 1) if line.strip())


def _broken_json_line(path: Path) -> str | None:
    """The first line that is not an object, or that has a value of another type than earlier lines."""
    if _is_json_array(path):
        return None
    kinds: dict[str, tuple[str, int]] = {}
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                return f"{number}: not valid JSON: {error}."
            if not isinstance(row, dict):
                return f"{number}: must be an object, but is {line.strip()[:50]!r}."
            for name, value in row.items():
                kind = "number" if isinstance(value, (int, float)) else type(value).__name__
                first, where = kinds.setdefault(name, (kind, number)) if value is not None else (kind, 0)
                if kind != first:
                    return f"{number}: {name!r} is of another type ({kind}) than in line {where} ({first})."
    return None


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow.parquet

    return list(pyarrow.parquet.read_schema(path).names)


def _nth(numbers: Iterator[int], index: int) -> int:
    return next((number for i, number in enumerate(numbers) if i == index), index + 1)


# --- a folder of class folders -----------------------------------------------------------------------------------


def _class_folders(path: Path, key: str) -> dict[str, list[Path]]:
    """The text files of each sub-folder, sorted."""
    folders = sorted(
        entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))
    )
    found = {folder.name: sorted(folder.glob("*.txt")) for folder in folders}
    found = {name: files for name, files in found.items() if files}
    if not found:
        hint = ""
        tables = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
        if tables:
            hint = f" It holds {', '.join(tables[:5])}: name the file."
        raise refusal(
            key, f"the folder {str(path)!r} has no sub-folders with .txt files, one for each label.{hint}"
        )
    return found


def _read_folder(place: Place, key: str) -> Table:
    import datasets

    folders = _class_folders(place.path or Path(), key)
    texts, names, notes = _texts([path for paths in folders.values() for path in paths], place.path or Path())
    labels = [label for label, paths in folders.items() for _ in paths]
    return Table(place, datasets.Dataset.from_dict({"text": texts, "label": labels}), names, notes)


def read_text_files(place: Place, key: str, column: str) -> Table:
    """Read the ``.txt`` files of a folder and its sub-folders, one row for each file.

    Args:
        place: the folder.
        key: the folder's key in the recipe, for messages.
        column: the name for the column of texts.

    Raises:
        RecipeError: the folder has no ``.txt`` files.
    """
    import datasets

    folder = place.path or Path()
    paths = sorted(path for path in folder.rglob("*.txt") if path.is_file())
    if not paths:
        raise refusal(key, f"the folder {str(folder)!r} has no .txt files.")
    texts, names, notes = _texts(paths, folder)
    return Table(place, datasets.Dataset.from_dict({column: texts}), names, notes)


def _texts(paths: Sequence[Path], folder: Path) -> tuple[list[str], list[str], list[str]]:
    """The texts of files, the files' paths from ``folder`` on, and a note about files that are not in UTF-8."""
    read = [_read_text(path) for path in paths]
    names = [f"{folder.name}/{path.relative_to(folder).as_posix()}" for path in paths]
    foreign = [name for name, (_, is_utf8) in zip(names, read, strict=True) if not is_utf8]
    notes = (
        [f"{len(foreign)} not in UTF-8, read as Windows-1252: {', '.join(foreign[:3])}."] if foreign else []
    )
    return [text.strip() for text, _ in read], names, notes


def _read_text(path: Path) -> tuple[str, bool]:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), False
