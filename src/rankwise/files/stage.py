"""The hidden folder in which a save is prepared, and the renames that put its files into place."""

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
PATIENCE = 60.0  # seconds to wait for another process that replaces files of the same folder
_QUIET = 24 * 3600.0  # seconds without a change after which a stage that can't be locked counts as abandoned


class HeldError(OSError):
    """Files of the folder are in the stage and could not be moved back."""


def in_stage(path: Path) -> bool:
    """Whether a file is a new one in a running save, which becomes visible together with the others."""
    return any(parent.name == "new" and parent.parent.name.startswith(PREFIX) for parent in path.parents)


class Stage:
    """A hidden folder in which one save is prepared. It is locked while its process lives.

    Args:
        path: an existing folder, inside the folder whose files it replaces.
        lock: the file descriptor of its lock file.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self._lock: int | None = lock
        self._at(path)
        # Whether files of the folder may be links into the stage, or may have been moved into it.
        self.entangled = False

    def _at(self, path: Path) -> None:
        self.path, self.folder = path, path.parent
        self.new, self.old, self.current = path / "new", path / "old", path / "current"
        self._spare = path / "spare"

    @classmethod
    def make(cls, folder: Path) -> Stage:
        """Create a stage in ``folder``, with the permissions of any new folder there."""
        while True:
            path = folder / f"{PREFIX}{HOST}-{secrets.token_hex(4)}"
            path.mkdir()
            # Until the new stage is locked, another process that cleans up may take it for an abandoned one.
            try:
                lock = open_lock(path / "lock")
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
                stage.entangled = True  # the other process removes the stage
                stage.__exit__()
            except BaseException:
                stage.__exit__()
                raise

    @classmethod
    def take_over(cls, path: Path) -> Stage | None:
        """Take over the stage at ``path`` if its process is dead; otherwise return None."""
        lock = open_lock(path / "lock")
        # Locks may not work across machines.
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
            unlock(self._lock)  # unlocked first, because an open file can't be removed on NFS and Windows
            self._lock = None
        if not self.entangled:
            with suppress(OSError):
                # Removed first: without `current`, old files would be put back.
                if self.old.exists():
                    shutil.rmtree(self.old)
                shutil.rmtree(self.path, ignore_errors=True)

    def _leave_its_name(self) -> None:
        """Rename the stage while it is locked, so that a process that is just creating it notices the removal."""
        name = f"{self.path.name.rpartition('-')[0]}-{secrets.token_hex(4)}"
        with suppress(OSError):  # fails on Windows, where a folder with an open file can't be renamed
            os.rename(self.path, self.folder / name)
            self._at(self.folder / name)

    def share_files(self) -> None:
        """Give the new files the usual permissions: safetensors makes files that only the owner can read."""
        mode = stat.S_IMODE(os.stat(self.path / "lock").st_mode)
        for name in files(self.new):
            os.chmod(self.new / name, mode)

    def become(self, folder: Path) -> bool:
        """Rename the new files to ``folder``. False if a folder with files has appeared there meanwhile."""
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
        """Replace files of the folder by those in ``new``, and remove files in ``owned`` that are not among them."""
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
            # If links show all files, old or new, only tidying is left. The next save or load does it.
            if not self.current.is_symlink():
                raise HeldError(error.errno, error.strerror) from error

    def _open_to_readers(self, names: Iterable[str]) -> None:
        # Everybody who may read the folder and its files must be able to read them through the links, too.
        for path in (self.path, self.old, self.new):
            with suppress(OSError):
                os.chmod(path, stat.S_IMODE(os.stat(self.folder).st_mode) | stat.S_IRWXU)
        for name in names:
            keep_mode(self.folder / name, self.new / name)

    def _can_link(self) -> bool:
        if os.name == "nt":  # a rename can't replace a link to a folder there
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
        """Replace all links and moved files by plain files in the folder. It may be repeated after a failure.

        Before the moment of the save, these are the old files; after it, the new ones.
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
        # The link's own target is not used: in a folder from elsewhere it may be any file of this machine.
        shown = self.new if os.readlink(self.current) == "new" else self.old
        source = shown / name
        if not (is_plain(source) and is_inside(self.path, f"{shown.name}/{name}")):
            place.unlink()
            return
        self._spare.unlink(missing_ok=True)
        try:
            # A second name, so that a reader that has just followed the link still finds the file.
            os.link(source, self._spare)
            os.replace(self._spare, place)
        except OSError:
            os.replace(source, place)


def clean(folder: Path) -> None:
    """Settle and remove the stages that killed processes left in ``folder``. Those that can't be removed stay."""
    for path in stages(folder):
        with suppress(OSError):
            stage = Stage.take_over(path)
            if stage is None:
                continue
            stage.entangled = True
            with stage, only_one(folder, patience=1):
                stage.settle()


def stages(folder: Path) -> list[Path]:
    """The stages in a folder; none if the folder can't be read."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if entry.name.startswith(PREFIX)]
    except OSError:
        return []
    return [folder / name for name in found if (folder / name).is_dir() and not (folder / name).is_symlink()]


def _is_quiet(stage: Path) -> bool:
    newest = max(path.lstat().st_mtime for path in (stage, *stage.rglob("*")) if path.name != "lock")
    return time.time() - newest > _QUIET
