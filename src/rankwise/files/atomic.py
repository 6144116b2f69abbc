"""Saving that can be killed at any moment: a folder shows its old files or its new ones, never a mix.

A folder can't simply be swapped for a finished copy of itself. It may be a mount point or some process's current
directory, and it may hold checkpoints. Others may write into it during a save: in a distributed run, Transformers'
Trainer writes the other processes' files into the same folder that the first process saves to. So only the files of the
save are replaced, all of them by a single rename:

1. The new files are written and flushed in a hidden folder, the *stage*, next to links to the old files:

       adapter/adapter_config.json
       adapter/.rankwise-HOST-1f3a/old/adapter_config.json
       adapter/.rankwise-HOST-1f3a/new/adapter_config.json
       adapter/.rankwise-HOST-1f3a/current -> old

2. Every file of the folder becomes a link through ``current``. Readers see no change.
3. ``current`` is renamed to a link to ``new``. This is the moment of the save, for all files and all readers.
4. Every link is replaced by the new file itself, which readers don't notice, and the stage is removed.

A folder that does not exist yet is written elsewhere and renamed into place. Whatever a killed process leaves can be
read by anything. The next save or load tidies it.

On Windows, and on file systems without symbolic links (FAT), the old files are moved into the stage and the new ones
out of it. ``adapter_config.json`` is moved first and comes back last. If the process is killed between these renames,
no reader takes the folder for an adapter until :func:`recover` completes it. So readers never see a mix.

A reader that opens two files one after the other can still get one file from before a save and one from after it. No
way of saving prevents that. :func:`read_folder` notices it and reads again.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from rankwise.files.disk import flush, flush_done, flush_tree, is_plain, keep_mode
from rankwise.files.explain import explained
from rankwise.files.stage import PREFIX, Stage, clean, in_stage, stages

T = TypeVar("T")

_READS = 20


def write_folder(folder: Path, write: Callable[[Path], None], owned: Collection[str] = ()) -> None:
    """Replace files of a folder all at once: a process killed at any moment leaves the old files or the new ones.

    Other files and subfolders of the folder are not touched.

    Args:
        folder: the folder. It is created if it does not exist; a link to a folder is followed.
        write: a function that writes the new files into an empty folder. It is called once with that folder's path.
        owned: the names of files, relative to the folder, that belong to the save. Those that ``write`` does not
            write are removed at the moment when the others are replaced.

    Raises:
        OSError: the files could not be written (a full disk, a limit, a permission). Nothing has changed then.
        ValueError: a name in ``owned`` leads out of the folder, or ``write`` made links instead of files.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "adapter"
        >>> def write(folder, rank):
        ...     _ = (folder / "adapter_config.json").write_text(f'{{"r": {rank}}}')
        >>> write_folder(folder, lambda new: write(new, rank=8))
        >>> _ = (folder / "README.md").write_text("mine")
        >>> write_folder(folder, lambda new: write(new, rank=16), owned=["training_state.safetensors"])
        >>> (folder / "adapter_config.json").read_text(), sorted(path.name for path in folder.iterdir())
        ('{"r": 16}', ['README.md', 'adapter_config.json'])
    """
    folder = Path(folder).resolve()
    names = {_checked_name(name) for name in owned}
    with explained(folder):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of this name")
        folder.parent.mkdir(parents=True, exist_ok=True)
        clean(folder)
        clean(folder.parent)
        with Stage.make(folder if folder.is_dir() else folder.parent) as stage:
            write(stage.new)
            _check_files(stage.new)
            stage.share_files()
            flush_tree(stage.new)
            if stage.folder != folder and not stage.become(folder):
                stage.move(folder)
            if stage.folder == folder:
                stage.publish(names)


def write_file(path: Path, data: bytes | str) -> None:
    """Write one file: a process killed at any moment leaves the old content or the new.

    Text is written as UTF-8, and line endings are kept. The file keeps its permissions. A link is replaced by a file.
    Inside the ``write`` function of `write_folder`, which is atomic itself, the file is written directly.

    Raises:
        OSError: the file could not be written. The old file has not changed then.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "ranks.json"
        >>> write_file(path, '{"q_proj": 4}')
        >>> path.read_text()
        '{"q_proj": 4}'
    """
    path = Path(path).absolute()
    content = data.encode() if isinstance(data, str) else data
    if in_stage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clean(path.parent)
        with Stage.make(path.parent) as stage:
            new = stage.new / path.name
            new.write_bytes(content)
            keep_mode(path, new)
            flush(new)
            os.replace(new, path)
            flush_done(path.parent)


def refuse_existing(path: Path) -> None:
    """Refuse a path at which something exists already.

    Raises:
        FileExistsError: the path is a file, or a folder that is not empty.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        what = "is there already" if path.is_file() else "is not empty"
        raise FileExistsError(
            f"{str(path)!r} {what}. Give another place, or say that it may be replaced: `overwrite=True`, on the "
            "command line `--overwrite`."
        )


def recover(folder: Path) -> None:
    """Tidy what a killed save left in a folder. Call it before reading the folder.

    It never fails. If it may not write, or another process is still saving, it changes nothing.

    Example:
        >>> recover(Path("a/folder/that/does/not/exist"))
    """
    clean(Path(folder).resolve())


def read_folder(folder: Path, names: Collection[str], read: Callable[[Path], T]) -> T:
    """Read several files of a folder that another process may be saving to, all from one version.

    Args:
        folder: the folder.
        names: the files that ``read`` opens, relative to the folder. They need not exist.
        read: a function of the folder. It is called again if one of the files was replaced meanwhile.

    Raises:
        OSError: the files were replaced again and again, faster than they could be read.
        Exception: any exception that ``read`` raises on files that were not replaced meanwhile.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_file(folder / "a", "1")
        >>> read_folder(folder, ["a", "b"], lambda folder: (folder / "a").read_text())
        '1'
    """
    folder = Path(folder)
    recover(folder)
    for attempt in range(_READS):
        with ExitStack() as stack:
            before = [_identity(folder / name, stack) for name in names]
            try:
                result = read(folder)
            except Exception:
                # The save is looked for first: it may end before the files are looked at, but then they have changed.
                quiet = not stages(folder) and before == [_identity(folder / name, stack) for name in names]
                if attempt == _READS - 1 or quiet:
                    raise
            else:
                if before == [_identity(folder / name, stack) for name in names]:
                    return result
        time.sleep(min(0.001 * 2**attempt, 0.1))
    message = (
        f"{folder} was saved to {_READS} times while it was being read. Read it when the saving is done."
    )
    raise OSError(errno.EBUSY, message)


def _checked_name(name: str) -> str:
    path = Path(name)
    if path.is_absolute() or not path.parts or os.pardir in path.parts or path.parts[0].startswith(PREFIX):
        raise ValueError(f"`owned` must hold names of files inside the folder, but has {name!r}.")
    return path.as_posix()


def _check_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not (is_plain(path) or path.is_dir()) or path.is_symlink():
            raise ValueError(f"`write` must make plain files and folders only, but made {path.name!r}.")
        if path.name.startswith(PREFIX):
            raise ValueError(f"`write` made {path.name!r}, but names with {PREFIX!r} are kept for saving.")


def _identity(path: Path, stack: ExitStack) -> tuple[bool, int, int] | None:
    """Values that change whenever a save touches the file; None if it is missing.

    They are the device and inode number, and whether the path is a link. A file that takes the place of a link to it
    keeps its inode number. Without hard links, a reader that follows the link at that moment misses the file.
    """
    try:
        # The stack keeps the file open. Otherwise a new file could get the inode number of a removed one.
        found = os.fstat(stack.enter_context(open(path, "rb", opener=_open_at_once)).fileno())
    except OSError:
        return None
    return path.is_symlink(), found.st_dev, found.st_ino


def _open_at_once(path: str, flags: int) -> int:
    """Open a file. If it is a pipe, don't wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
