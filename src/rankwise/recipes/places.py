"""The places of a recipe's model and data: a local path, a file inside a PyPI package, or a hub name."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rankwise.config.suggest import nearest
from rankwise.recipes.errors import did_you_mean, refusal

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGE_PREFIX = "pypi:"


@dataclass(frozen=True)
class Place:
    """A place that was found.

    Args:
        name: the name that the recipe uses.
        path: the local file or folder. None: the name is one on the Hugging Face hub.
    """

    name: str
    path: Path | None

    @property
    def reference(self) -> str:
        """The name to use in a copy of the recipe that works from every folder."""
        return str(self.path) if self.path and not self.name.startswith(_PACKAGE_PREFIX) else self.name


def find_place(reference: str, key: str, beside: Path | None = None) -> Place:
    """Find the place that a recipe refers to, without the network.

    A relative path is looked up in the current folder first, then in the recipe's folder.

    Args:
        reference: a path; ``pypi:DISTRIBUTION`` with an optional ``/path`` inside the installed package; or a
            name on the Hugging Face hub, with or without an owner.
        key: the recipe's key, for messages.
        beside: the recipe's folder.

    Raises:
        RecipeError: there is no such file, folder or package, and it can't be a hub name.
    """
    if reference.startswith(_PACKAGE_PREFIX):
        return Place(reference, find_in_package(reference, key))
    path = Path(reference).expanduser()
    for candidate in (path, (beside or Path()) / path):
        if candidate.exists():
            return Place(reference, candidate.resolve())
    if _may_be_hub_name(reference, beside or Path()):
        return Place(reference, None)
    raise refusal(key, _nothing_there(reference, path, beside))


def refuse_unreachable(place: Place, key: str, files: Sequence[str], kind: str = "model") -> None:
    """Refuse a hub name that is not in the hub's local cache while the hub can't be reached.

    Without this check, loading would retry for minutes.

    Args:
        place: the place of a model or a dataset.
        key: the recipe's key, for messages.
        files: file names of the repository. If one of them is in the cache, the repository counts as cached.
        kind: the kind of repository: ``model`` or ``dataset``.

    Raises:
        RecipeError: the repository is not in the cache, and the hub can't be reached.
    """
    if place.path is not None:
        return
    from huggingface_hub import constants, try_to_load_from_cache

    cached = (try_to_load_from_cache(place.name, file, repo_type=kind) for file in files)
    if constants.HF_HUB_OFFLINE or any(isinstance(path, str) for path in cached) or _hub_answers():
        return
    raise refusal(
        key,
        f"there is no file or folder {place.name!r} here, and the Hugging Face hub ({constants.ENDPOINT}) can't be "
        f"reached to look for a {kind} of that name. Correct the path, or check the connection.",
    )


@functools.cache
def _hub_answers() -> bool:
    """Whether the hub answers within `_PATIENCE` seconds. Each process asks once, through a proxy if one is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # the type depends on the HTTP library that huggingface_hub uses
        return False
    return True


_PATIENCE = 5.0  # seconds


def find_in_package(reference: str, key: str) -> Path:
    """The file or folder that ``pypi:DISTRIBUTION[/path]`` names in an installed distribution.

    Without a path, this is the folder with a model's ``config.json``, or the only ``.gguf`` file.

    Raises:
        RecipeError: the distribution is not installed, or has no such path or no model.
    """
    name, _, inside = reference[len(_PACKAGE_PREFIX) :].partition("/")
    inside = inside.strip("/")
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise refusal(
            key, f"the package {name!r} is not installed. Install it: pip install {name or 'NAME'}"
        ) from None
    files = [PurePosixPath(str(file).replace("\\", "/")) for file in distribution.files or []]
    found = _paths_ending_in(inside, files) if inside else _model_folders(distribution, files)
    if len(found) == 1:
        return Path(str(distribution.locate_file(str(found[0]))))
    if inside:
        folders = {str(parent) for file in files for parent in file.parents if str(parent) != "."}
        hint = did_you_mean(inside, sorted(folders)) if not found else f"It could be {_listed(found)}."
        raise refusal(key, f"the package {name!r} has no single path {inside!r}. {hint}")
    hint = "It holds no model's config.json and no .gguf file."
    if found:
        hint = f"It has {_listed(found)}: write pypi:{name}/{found[0]}"
    raise refusal(key, f"the package {name!r} is not one model. {hint}")


def _paths_ending_in(inside: str, files: list[PurePosixPath]) -> list[PurePosixPath]:
    """The file or folder at the path ``inside`` of a package or, if there is none, those whose paths end in it."""
    wanted = PurePosixPath(inside).parts
    paths = {path for file in files for path in (file, *file.parents)}
    found = sorted(path for path in paths if path.parts[-len(wanted) :] == wanted)
    exact = [path for path in found if path.parts == wanted]
    return exact or found


def _model_folders(
    distribution: importlib.metadata.Distribution, files: list[PurePosixPath]
) -> list[PurePosixPath]:
    """The folders with a model's ``config.json`` or, if there are none, the GGUF files."""
    folders = [file.parent for file in files if file.name == "config.json" and _is_model(distribution, file)]
    return folders or [file for file in files if file.suffix == ".gguf"]


def _is_model(distribution: importlib.metadata.Distribution, file: PurePosixPath) -> bool:
    try:
        config = json.loads(Path(str(distribution.locate_file(str(file)))).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _may_be_hub_name(reference: str, beside: Path) -> bool:
    """Whether a name without a local file looks like a hub name rather than a misspelled path."""
    if not _HUB_NAME.fullmatch(reference) or Path(reference).suffix in _FILE_SUFFIXES:
        return False
    owner = Path(reference).parts[0]
    return "/" not in reference or not any((folder / owner).is_dir() for folder in (Path(), beside))


_FILE_SUFFIXES = {
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".parquet",
    ".txt",
    ".zip",
    ".gz",
    ".safetensors",
    ".bin",
    ".gguf",
}


def _nothing_there(reference: str, path: Path, beside: Path | None) -> str:
    places = dict.fromkeys(str(folder) for folder in (Path.cwd(), beside) if folder is not None)
    where = "" if path.is_absolute() else f" (looked in {' and in '.join(places)})"
    near = next(_near_paths(path, beside or Path()), None)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"there is no file or folder {reference!r}{where}.{hint}"


def _near_paths(path: Path, beside: Path) -> Iterator[str]:
    """Suggestions for a path: its first missing part is replaced by the nearest name that exists."""
    for start in (Path(), beside):
        whole = start / path
        missing = next(
            (
                part
                for part in (*reversed(whole.parents), whole)
                if not part.exists() and part.parent.is_dir()
            ),
            None,
        )
        if missing is None:
            continue
        # Users rarely misspell the ending, so only names with the same ending are suggested.
        entries = (entry.name for entry in missing.parent.iterdir() if entry.suffix == missing.suffix)
        name = nearest(missing.name, sorted(entries), or_part=True)
        if name is not None:
            mended = missing.parent / name / whole.relative_to(missing)
            yield str(mended.relative_to(start) if not path.is_absolute() else mended)


def _listed(paths: list[PurePosixPath]) -> str:
    return ", ".join(str(path) for path in paths[:5]) + (", …" if len(paths) > 5 else "")
