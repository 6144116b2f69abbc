"""Saving that can be killed at any moment: a folder shows its old files or its new ones, never a mix.

A folder can't simply be swapped for a finished copy of itself: it may be a mount point or some process's
current directory, it may hold checkpoints, and others write into it while a save runs (in a distributed run,
Transformers' Trainer writes the other ranks' files into the very folder that rank 0 saves to). So only the
files of the save are replaced, all of them by a single rename:

1. the new files are written and flushed in a hidden folder, the *stage*, beside links to the old ones::

       adapter/adapter_config.json
       adapter/.rankwise-HOST-1f3a/old/adapter_config.json
       adapter/.rankwise-HOST-1f3a/new/adapter_config.json
       adapter/.rankwise-HOST-1f3a/current -> old

2. every file of the folder becomes a link through ``current``, which changes nothing for a reader;
3. ``current`` is renamed to a link to ``new``: this is the moment of the save, for all files and all readers;
4. every link becomes the new file itself, which again changes nothing, and the stage goes.

A folder that does not exist yet is written aside and renamed into place. What a killed process leaves is
readable by anything, and is tidied by the next save or load. On Windows, or on a file system without symbolic
links (FAT), the old files are moved into the stage, ``adapter_config.json`` first, and the new ones out of it,
``adapter_config.json`` last: a kill among those renames leaves a folder that no reader takes for an adapter,
rather than a mix, until :func:`recover` completes it.

A reader that opens two files one after the other can still get one from before a save and one from after it,
however the save is done; :func:`read_folder` notices and reads again.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")

_PREFIX = ".rankwise-"
_HOST = re.sub(r"[^A-Za-z0-9.-]", "_", platform.node())[:64]
# Readers take a folder without this file for no adapter at all.
_ENTRY = "adapter_config.json"
_PATIENCE = 60.0  # seconds to wait for another process that is replacing files of the same folder
_QUIET = 24 * 3600.0  # seconds without a change after which a stage that can't be locked counts as dead
_READS = 20


def write_folder(folder: Path, write: Callable[[Path], None], owned: Collection[str] = ()) -> None:
    """Replace files of a folder all at once: a process killed at any moment leaves the old ones or the new.

    Other files and sub-directories of the folder stay as they are and where they are.

    Args:
        folder: made if it does not exist; a link to a folder is followed.
        write: called once with the path of an empty folder, to put the new files into it.
        owned: names of files, relative to the folder, that belong to the save: those that ``write`` did not
            write are removed, in the same instant as the others are replaced.

    Raises:
        OSError: the files could not be written (a full disk, a limit, a permission). Nothing changed.
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
    with _explained(folder):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of this name")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        _clean(folder.parent)
        with _Stage.make(folder if folder.is_dir() else folder.parent) as stage:
            write(stage.new)
            _check_files(stage.new)
            stage.share_files()
            _flush_tree(stage.new)
            if stage.folder != folder and not stage.become(folder):
                stage.move(folder)
            if stage.folder == folder:
                stage.publish(names)


def write_file(path: Path, data: bytes | str) -> None:
    """Write one file: a process killed at any moment leaves the old content or the new.

    Text is written as UTF-8, line ends as they are. The file keeps its permissions; a link becomes a file.

    Raises:
        OSError: the file could not be written. The old one has not changed then.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "ranks.json"
        >>> write_file(path, '{"q_proj": 4}')
        >>> path.read_text()
        '{"q_proj": 4}'
    """
    path = Path(path).absolute()
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path.parent)
        with _Stage.make(path.parent) as stage:
            new = stage.new / path.name
            new.write_bytes(data.encode() if isinstance(data, str) else data)
            _keep_mode(path, new)
            _flush(new)
            os.replace(new, path)
            _flush_done(path.parent)


def refuse_existing(path: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        FileExistsError: it is a file, or a folder that is not empty.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        what = "is there already" if path.is_file() else "is not empty"
        raise FileExistsError(
            f"{str(path)!r} {what}. Give another place, or say that it may be replaced: `overwrite=True`, on the "
            "command line `--overwrite`."
        )


def recover(folder: Path) -> None:
    """Tidy what a killed save left in a folder; call it before reading one.

    It never fails: where it may not write, or another process is still saving, it leaves all as it is.

    Example:
        >>> recover(Path("a/folder/that/does/not/exist"))
    """
    _clean(Path(folder).resolve())


def read_folder(folder: Path, names: Collection[str], read: Callable[[Path], T]) -> T:
    """Read several files of a folder that another process may be saving to, all from one version.

    Args:
        folder: the folder.
        names: the files that ``read`` opens, relative to the folder; they need not exist.
        read: called with the folder; called again if one of the files was replaced meanwhile.

    Raises:
        OSError: the files were replaced again and again, faster than they could be read.
        Exception: whatever ``read`` raises on files that were not replaced meanwhile.

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
                unchanged = before == [_identity(folder / name, stack) for name in names]
                if attempt == _READS - 1 or (unchanged and not _stages(folder)):
                    raise
            else:
                if before == [_identity(folder / name, stack) for name in names]:
                    return result
        time.sleep(min(0.001 * 2**attempt, 0.1))
    message = (
        f"{folder} was saved to {_READS} times while it was being read. Read it when the saving is done."
    )
    raise OSError(errno.EBUSY, message)


class _HeldError(OSError):
    """Files of the folder are in the stage, and could not be moved back."""


class _Stage:
    """A hidden folder in which one save is prepared, locked for as long as its process lives.

    Args:
        path: an existing folder, inside the folder whose files it replaces.
        lock: its open lock file.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self._lock: int | None = lock
        self._at(path)
        # Whether files of the folder may be links into the stage, or be held in it.
        self.entangled = False

    def _at(self, path: Path) -> None:
        self.path, self.folder = path, path.parent
        self.new, self.old, self.current = path / "new", path / "old", path / "current"
        self._spare = path / "spare"

    @classmethod
    def make(cls, folder: Path) -> _Stage:
        """Make a stage in ``folder``, with the permissions that any new folder gets there."""
        while True:
            path = folder / f"{_PREFIX}{_HOST}-{secrets.token_hex(4)}"
            path.mkdir()
            # Another process that cleans may take the new stage for a dead one until it is locked.
            try:
                lock = _open_lock(path)
            except FileNotFoundError:
                continue
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                raise
            stage = cls(path, lock)
            try:
                if _try_lock(lock) is not False and (path / "lock").exists():
                    stage.new.mkdir()
                    return stage
                stage.entangled = True  # with the process that cleans: it removes the stage
                stage.__exit__()
            except BaseException:
                stage.__exit__()
                raise

    @classmethod
    def take_over(cls, path: Path) -> _Stage | None:
        """The stage at ``path`` if its process is dead, else None."""
        lock = _open_lock(path)
        # Locks may not reach across machines.
        ours = path.name[len(_PREFIX) :].rpartition("-")[0] == _HOST
        try:
            locked = _try_lock(lock)
            if locked is not False and ((locked and ours) or _is_quiet(path)):
                return cls(path, lock)
        except OSError:
            pass
        _unlock(lock)
        return None

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            _unlock(self._lock)  # first: an open file can't be removed on NFS and Windows
            self._lock = None
        if not self.entangled:
            with suppress(OSError):
                # First: without `current`, old files are taken for ones to put back.
                if self.old.exists():
                    shutil.rmtree(self.old)
                shutil.rmtree(self.path, ignore_errors=True)

    def share_files(self) -> None:
        """Give the new files the permissions of any new file: safetensors makes files for their owner only."""
        mode = stat.S_IMODE(os.stat(self.path / "lock").st_mode)
        for name in _files(self.new):
            os.chmod(self.new / name, mode)

    def become(self, folder: Path) -> bool:
        """Rename the new files to ``folder``; False if a folder with files has appeared there meanwhile."""
        try:
            os.rename(self.new, folder)
        except OSError as error:
            if folder.is_dir() and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                return False
            raise
        _flush_done(folder.parent)
        return True

    def move(self, folder: Path) -> None:
        """Move the whole stage into ``folder``."""
        os.rename(self.path, folder / self.path.name)
        self._at(folder / self.path.name)

    def publish(self, owned: Iterable[str]) -> None:
        """Replace files of the folder by those in ``new``, and remove those of ``owned`` not among them."""
        with _only_one(self.folder, _PATIENCE):
            names = _in_order({*_files(self.new), *(name for name in owned if _is_there(self.folder / name))})
            for name in names:
                if (self.folder / name).is_dir() or not _is_inside(self.folder, name):
                    raise OSError(errno.EISDIR, f"{name!r} in it is a folder, or lies in a linked one")
            self.entangled = True
            try:
                self.old.mkdir()
                self._open_to_readers(names)
                if self._can_link():
                    self._switch(names)
                else:
                    self._swap(names)
            except BaseException:
                self._settle_if_possible()
                raise
            self._settle_if_possible()

    def _settle_if_possible(self) -> None:
        try:
            self.settle()
        except OSError as error:
            # Where links show all files, old or new, only tidying is left, to the next save or load.
            if not self.current.is_symlink():
                raise _HeldError(error.errno, error.strerror) from error

    def _open_to_readers(self, names: Iterable[str]) -> None:
        # Whoever may read the folder and its files may go on to do so, through links too.
        for path in (self.path, self.old, self.new):
            with suppress(OSError):
                os.chmod(path, stat.S_IMODE(os.stat(self.folder).st_mode) | stat.S_IRWXU)
        for name in names:
            _keep_mode(self.folder / name, self.new / name)

    def _can_link(self) -> bool:
        if os.name == "nt":  # where a link to a folder can't be replaced by a rename
            return False
        try:
            os.symlink("old", self.current)
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
                raise
            return False
        return True

    def _switch(self, names: list[str]) -> None:
        for name in names:
            if (self.folder / name).is_file():
                _duplicate(self.folder / name, self.old / name)
        _flush_tree(self.old, files=False)
        _flush(self.path)
        for name in names:
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            up = [os.pardir] * name.count("/")
            os.symlink(os.path.join(*up, self.path.name, "current", name), self._spare)
            os.replace(self._spare, place)
        _flush_folders(self.folder, names)
        os.symlink("new", self._spare)
        os.replace(self._spare, self.current)
        _flush_done(self.path)

    def _swap(self, names: list[str]) -> None:
        for name in reversed(names):
            if _is_there(self.folder / name):
                (self.old / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.folder / name, self.old / name)
        _flush_folders(self.folder, names)
        os.rename(self.new, self.current)
        _flush_done(self.path)

    def settle(self) -> None:
        """Make plain files of all that the folder shows through the stage; may be repeated after a failure.

        The old files before the moment of the save, the new ones after it.
        """
        if self.current.is_symlink():
            names = {*_files(self.old), *_files(self.new)}
            for name in names:
                self._untangle(name)
        else:
            held = self.current if self.current.is_dir() else self.old
            names = set(_files(held))
            for name in _in_order(names):
                if _is_inside(self.folder, name):
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(held / name, self.folder / name)
        _flush_folders(self.folder, names)
        self.entangled = False

    def _untangle(self, name: str) -> None:
        place = self.folder / name
        if not (_is_inside(self.folder, name) and place.is_symlink()):
            return
        if self.path.name not in Path(os.readlink(place)).parts:
            return
        # Not what the link leads to: in a folder from elsewhere that may be any file of this machine.
        shown = self.new if os.readlink(self.current) == "new" else self.old
        source = shown / name
        if not (_is_plain(source) and _is_inside(self.path, f"{shown.name}/{name}")):
            place.unlink()
            return
        self._spare.unlink(missing_ok=True)
        try:
            # A second name, so that a reader who has just followed the link still finds the file.
            os.link(source, self._spare)
            os.replace(self._spare, place)
        except OSError:
            os.replace(source, place)


def _clean(folder: Path) -> None:
    """Settle and remove the stages that killed processes left in ``folder``, as far as that is possible."""
    for path in _stages(folder):
        with suppress(OSError):
            stage = _Stage.take_over(path)
            if stage is None:
                continue
            stage.entangled = True
            with stage, _only_one(folder, patience=1):
                stage.settle()


def _stages(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if entry.name.startswith(_PREFIX)]
    except OSError:
        return []
    return [folder / name for name in found if (folder / name).is_dir() and not (folder / name).is_symlink()]


def _open_lock(stage: Path) -> int:
    return os.open(stage / "lock", os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _try_lock(file: int) -> bool | None:
    """Lock an open file: True if that worked, False if another process has it, None if it can't be done."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass
    return None


def _unlock(file: int) -> None:
    # Closing is not enough if the process was forked meanwhile.
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


@contextmanager
def _only_one(folder: Path, patience: float) -> Iterator[None]:
    """Be the only process that replaces files of ``folder``, where folders can be locked."""
    if os.name == "nt":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + patience
        while _try_lock(handle) is False:
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, "another process is replacing its files")
            time.sleep(0.005)
        yield
    finally:
        _unlock(handle)


def _is_quiet(stage: Path) -> bool:
    newest = max(path.lstat().st_mtime for path in (stage, *stage.rglob("*")) if path.name != "lock")
    return time.time() - newest > _QUIET


def _checked_name(name: str) -> str:
    path = Path(name)
    if path.is_absolute() or not path.parts or os.pardir in path.parts or path.parts[0].startswith(_PREFIX):
        raise ValueError(f"`owned` must hold names of files inside the folder, but has {name!r}.")
    return path.as_posix()


def _check_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not (_is_plain(path) or path.is_dir()) or path.is_symlink():
            raise ValueError(f"`write` must make plain files and folders only, but made {path.name!r}.")
        if path.name.startswith(_PREFIX):
            raise ValueError(f"`write` made {path.name!r}, but names with {_PREFIX!r} are kept for saving.")


def _files(folder: Path) -> list[str]:
    """The names of all plain files below ``folder``, relative to it; none if it is missing or a link."""
    if folder.is_symlink():
        return []
    return [
        path.relative_to(folder).as_posix()
        for root, _, names in os.walk(folder)
        for path in (Path(root, name) for name in names)
        if _is_plain(path)
    ]


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == _ENTRY, name))


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_there(path: Path) -> bool:
    return path.is_file() or path.is_symlink()


def _is_inside(folder: Path, name: str) -> bool:
    """Whether the way from the folder to the file goes through no link."""
    direct = Path(os.path.realpath(folder), name).parent
    return Path(os.path.realpath((folder / name).parent)) == direct


def _identity(path: Path, stack: ExitStack) -> tuple[int, int] | None:
    """What tells the file from any that replaces it while ``stack`` is open; None if it is missing."""
    try:
        # While it is open, no new file can get its number.
        found = os.fstat(stack.enter_context(open(path, "rb", opener=_open_at_once)).fileno())
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; if it is a pipe, without waiting for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _duplicate(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that can't be done; a link gives the file it leads to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        shutil.copy2(source, target)
        _flush(target)


def _keep_mode(old: Path, new: Path) -> None:
    with suppress(OSError):
        os.chmod(new, stat.S_IMODE(os.stat(old).st_mode))


def _flush(path: Path) -> None:
    """Have a file or a folder on the disk, not only in memory, before going on."""
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


def _flush_done(folder: Path) -> None:
    # The new files are in place: an error now is no reason to say that they are not.
    with suppress(OSError):
        _flush(folder)


def _flush_tree(folder: Path, files: bool = True) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names if files else ():
            _flush(Path(root, name))
        _flush(Path(root))


def _flush_folders(folder: Path, names: Iterable[str]) -> None:
    for path in {folder, *((folder / name).parent for name in names)}:
        with suppress(FileNotFoundError):
            _flush(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what went wrong while writing into an OSError that says what is the matter and what to do."""
    existed = path.is_file() or (path.is_dir() and any(path.iterdir()))
    try:
        yield
    except Exception as error:
        number = _errno_of(error)
        if number is None:
            raise
        kept = "The previous version there is whole." if existed else "Nothing was written there."
        if isinstance(error, _HeldError):
            kept = f"Its files are held in {path}/{_PREFIX}* until the next save or load moves them back."
        raise OSError(number, _message(path, number, error, kept)) from error


def _errno_of(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    # safetensors writes in Rust, and has only the text of what the system said.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def _said_by(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _message(path: Path, number: int, error: Exception, kept: str) -> str:
    why, mend = {
        errno.ENOSPC: ("the disk is full", "Free space on it"),
        errno.EDQUOT: ("the disk quota is used up", "Free space within the quota"),
        errno.EFBIG: ("a file would be larger than the limit for files", "Raise the limit (`ulimit -f`)"),
        errno.EROFS: ("the file system is read-only", "Mount it for writing"),
    }.get(number, (_said_by(error), "Set that right"))
    return f"Could not save to {path}: {why}. {kept} {mend}, or save to another place, and save again."
