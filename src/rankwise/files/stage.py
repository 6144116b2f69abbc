"""The hidden folder in which a save is prepared, and the renames that make it the folder's content."""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from rankwise.files.disk import (
    duplicate,
    files,
    flush,
    flush_done,
    flush_folders,
    flush_tree,
    in_order,
    is_inside,
    is_plain,
    is_there,
    keep_mode,
)
from rankwise.files.locks import only_one, open_lock, try_lock, unlock

PREFIX = ".rankwise-"
HOST = re.sub(r"[^A-Za-z0-9.-]", "_", platform.node())[:64]
PATIENCE = 60.0  # seconds to wait for another process that is replacing files of the same folder
_QUIET = 24 * 3600.0  # seconds without a change after which a stage that can't be locked counts as dead


class HeldError(OSError):
    """Files of the folder are in the stage, and could not be moved back."""


def in_stage(path: Path) -> bool:
    """Whether a file is a new one of a save under way, which becomes visible with all the others."""
    return any(parent.name == "new" and parent.parent.name.startswith(PREFIX) for parent in path.parents)


class Stage:
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
    def make(cls, folder: Path) -> Stage:
        """Make a stage in ``folder``, with the permissions that any new folder gets there."""
        while True:
            path = folder / f"{PREFIX}{HOST}-{secrets.token_hex(4)}"
            path.mkdir()
            # Another process that cleans may take the new stage for a dead one until it is locked.
            try:
                lock = open_lock(path)
            except FileNotFoundError:
                continue
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                raise
            stage = cls(path, lock)
            try:
                if try_lock(lock) is not False and (path / "lock").exists():
                    stage.new.mkdir()
                    return stage
                stage.entangled = True  # with the process that cleans: it removes the stage
                stage.__exit__()
            except BaseException:
                stage.__exit__()
                raise

    @classmethod
    def take_over(cls, path: Path) -> Stage | None:
        """The stage at ``path`` if its process is dead, else None."""
        lock = open_lock(path)
        # Locks may not reach across machines.
        ours = path.name[len(PREFIX) :].rpartition("-")[0] == HOST
        try:
            locked = try_lock(lock)
            if locked is not False and ((locked and ours) or _is_quiet(path)):
                return cls(path, lock)
        except OSError:
            pass
        unlock(lock)
        return None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            if not self.entangled:
                self._leave_its_name()
            unlock(self._lock)  # first: an open file can't be removed on NFS and Windows
            self._lock = None
        if not self.entangled:
            with suppress(OSError):
                # First: without `current`, old files are taken for ones to put back.
                if self.old.exists():
                    shutil.rmtree(self.old)
                shutil.rmtree(self.path, ignore_errors=True)

    def _leave_its_name(self) -> None:
        """Rename the stage, while it is locked, so that whoever is just making it takes it for gone."""
        name = f"{self.path.name.rpartition('-')[0]}-{secrets.token_hex(4)}"
        with suppress(OSError):  # on Windows, where a folder with an open file keeps its name
            os.rename(self.path, self.folder / name)
            self._at(self.folder / name)

    def share_files(self) -> None:
        """Give the new files the permissions of any new file: safetensors makes files for their owner only."""
        mode = stat.S_IMODE(os.stat(self.path / "lock").st_mode)
        for name in files(self.new):
            os.chmod(self.new / name, mode)

    def become(self, folder: Path) -> bool:
        """Rename the new files to ``folder``; False if a folder with files has appeared there meanwhile."""
        try:
            os.rename(self.new, folder)
        except OSError as error:
            if folder.is_dir() and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                return False
            raise
        flush_done(folder.parent)
        return True

    def move(self, folder: Path) -> None:
        """Move the whole stage into ``folder``."""
        os.rename(self.path, folder / self.path.name)
        self._at(folder / self.path.name)

    def publish(self, owned: Iterable[str]) -> None:
        """Replace files of the folder by those in ``new``, and remove those of ``owned`` not among them."""
        with only_one(self.folder, PATIENCE):
            names = in_order({*files(self.new), *(name for name in owned if is_there(self.folder / name))})
            for name in names:
                if (self.folder / name).is_dir() or not is_inside(self.folder, name):
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
                raise HeldError(error.errno, error.strerror) from error

    def _open_to_readers(self, names: Iterable[str]) -> None:
        # Whoever may read the folder and its files may go on to do so, through links too.
        for path in (self.path, self.old, self.new):
            with suppress(OSError):
                os.chmod(path, stat.S_IMODE(os.stat(self.folder).st_mode) | stat.S_IRWXU)
        for name in names:
            keep_mode(self.folder / name, self.new / name)

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
                duplicate(self.folder / name, self.old / name)
        flush_tree(self.old, files=False)
        flush(self.path)
        for name in names:
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            up = [os.pardir] * name.count("/")
            os.symlink(os.path.join(*up, self.path.name, "current", name), self._spare)
            os.replace(self._spare, place)
        flush_folders(self.folder, names)
        os.symlink("new", self._spare)
        os.replace(self._spare, self.current)
        flush_done(self.path)

    def _swap(self, names: list[str]) -> None:
        for name in reversed(names):
            if is_there(self.folder / name):
                (self.old / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.folder / name, self.old / name)
        flush_folders(self.folder, names)
        os.rename(self.new, self.current)
        flush_done(self.path)

    def settle(self) -> None:
        """Make plain files of all that the folder shows through the stage; may be repeated after a failure.

        The old files before the moment of the save, the new ones after it.
        """
        if self.current.is_symlink():
            names = {*files(self.old), *files(self.new)}
            for name in names:
                self._untangle(name)
        else:
            held = self.current if self.current.is_dir() else self.old
            names = set(files(held))
            for name in in_order(names):
                if is_inside(self.folder, name):
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(held / name, self.folder / name)
        flush_folders(self.folder, names)
        self.entangled = False

    def _untangle(self, name: str) -> None:
        place = self.folder / name
        if not (is_inside(self.folder, name) and place.is_symlink()):
            return
        if self.path.name not in Path(os.readlink(place)).parts:
            return
        # Not what the link leads to: in a folder from elsewhere that may be any file of this machine.
        shown = self.new if os.readlink(self.current) == "new" else self.old
        source = shown / name
        if not (is_plain(source) and is_inside(self.path, f"{shown.name}/{name}")):
            place.unlink()
            return
        self._spare.unlink(missing_ok=True)
        try:
            # A second name, so that a reader who has just followed the link still finds the file.
            os.link(source, self._spare)
            os.replace(self._spare, place)
        except OSError:
            os.replace(source, place)


def clean(folder: Path) -> None:
    """Settle and remove the stages that killed processes left in ``folder``, as far as that is possible."""
    for path in stages(folder):
        with suppress(OSError):
            stage = Stage.take_over(path)
            if stage is None:
                continue
            stage.entangled = True
            with stage, only_one(folder, patience=1):
                stage.settle()


def stages(folder: Path) -> list[Path]:
    """The stages in a folder; none if it can't be read."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if entry.name.startswith(PREFIX)]
    except OSError:
        return []
    return [folder / name for name in found if (folder / name).is_dir() and not (folder / name).is_symlink()]


def _is_quiet(stage: Path) -> bool:
    newest = max(path.lstat().st_mtime for path in (stage, *stage.rglob("*")) if path.name != "lock")
    return time.time() - newest > _QUIET
