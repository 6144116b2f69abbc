"""Explains errors in writing, and says what to do."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankwise.files.stage import PREFIX, HeldError

# The system's numbers of errors that say that a file can't be written, whatever is in it.
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error in writing into an OSError that says what is wrong and what to do."""
    existed = path.is_file() or (path.is_dir() and any(path.iterdir()))
    try:
        yield
    except Exception as error:
        number = errno_of(error)
        if number is None:
            raise
        kept = "The previous version there is whole." if existed else "Nothing was written there."
        if isinstance(error, HeldError):
            kept = f"Its files are held in {path}/{PREFIX}* until the next save or load moves them back."
        raise OSError(number, _message(path, number, error, kept)) from error


def is_of_torch_save(error: Exception) -> bool:
    """Whether PyTorch could not write a file. Its writer does not give the system's error; usually the disk is full."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    in_writer = any(each.filename.endswith("serialization.py") and each.name == "__exit__" for each in last)
    return isinstance(error, RuntimeError) and in_writer


def errno_of(error: Exception) -> int | None:
    """The system's number of an error in writing, or None if the error is another one."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if is_of_torch_save(error):
        return errno.ENOSPC
    # safetensors and tokenizers write in Rust, and keep only the text of the system's error.
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
