"""Lists the files in a folder, and flushes them to the disk."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# Readers don't take a folder without this file for an adapter.
ENTRY = "adapter_config.json"


def files(folder: Path) -> list[str]:
    """The names of all plain files below ``folder``, relative to it; none if the folder is missing or a link."""
    if folder.is_symlink():
        return []
    return [
        path.relative_to(folder).as_posix()
        for root, _, names in os.walk(folder)
        for path in (Path(root, name) for name in names)
        if is_plain(path)
    ]


def in_order(names: Iterable[str]) -> list[str]:
    """The order in which to put files back: the file by which readers recognize an adapter comes last."""
    return sorted(names, key=lambda name: (name == ENTRY, name))


def is_plain(path: Path) -> bool:
    """Whether a path is a file and not a link to one."""
    return path.is_file() and not path.is_symlink()


def is_there(path: Path) -> bool:
    """Whether a path is a file or a link, even a broken one."""
    return path.is_file() or path.is_symlink()


def is_inside(folder: Path, name: str) -> bool:
    """Whether the path from the folder to the file contains no links."""
    direct = Path(os.path.realpath(folder), name).parent
    return Path(os.path.realpath((folder / name).parent)) == direct


def duplicate(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it if that is impossible. For a link, the file that it leads to is used."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        shutil.copy2(source, target)
        flush(target)


def keep_mode(old: Path, new: Path) -> None:
    """Give the new file the permissions of the old one, if there is one."""
    with suppress(OSError):
        os.chmod(new, stat.S_IMODE(os.stat(old).st_mode))


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk, not only in memory."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems can't flush a folder.
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(handle)


def flush_done(folder: Path) -> None:
    """Flush a folder in which the new files are in place."""
    # The save has succeeded already, so an error here must not report that it failed.
    with suppress(OSError):
        flush(folder)


def flush_tree(folder: Path, files: bool = True) -> None:
    """Flush a folder and everything in it; without ``files``, only the folders."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names if files else ():
            flush(Path(root, name))
        flush(Path(root))


def flush_folders(folder: Path, names: Iterable[str]) -> None:
    """Flush a folder, and its subfolders that hold the files ``names``."""
    for path in {folder, *((folder / name).parent for name in names)}:
        with suppress(FileNotFoundError):
            flush(path)
