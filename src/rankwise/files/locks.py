"""Locks on files and folders, on systems that have them."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# The name of a file that exists and is locked while `rankwise train` trains into its folder. A process that is killed
# leaves it behind.
TRAINING = ".rankwise-training"


def open_lock(path: Path) -> int:
    """Open a lock file. It is created if it does not exist."""
    return os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)


def try_lock(file: int) -> bool | None:
    """Lock an open file. True: locked. False: another process holds the lock. None: locks are not supported."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass
    return None


def unlock(file: int) -> None:
    """Unlock and close an open file."""
    # Closing alone does not unlock if the process was forked meanwhile.
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


@contextmanager
def only_one(folder: Path, patience: float) -> Iterator[None]:
    """Be the only process that replaces files of ``folder``, if folders can be locked.

    Args:
        folder: the folder.
        patience: the seconds to wait for another process.

    Raises:
        TimeoutError: another process held the lock for that time.
    """
    if os.name == "nt":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + patience
        while try_lock(handle) is False:
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, "another process is replacing its files")
            time.sleep(0.005)
        yield
    finally:
        unlock(handle)


@contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Hold a lock file, and remove it in the end. Gives False if another process holds it."""
    file = open_lock(path)
    if try_lock(file) is False:
        os.close(file)
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            path.unlink()
        unlock(file)
