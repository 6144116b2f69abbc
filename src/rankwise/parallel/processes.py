"""The processes of a group: which process writes files, and how processes wait for each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


def many_processes() -> bool:
    """Whether this process belongs to a process group, over which gradients may be averaged."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def writes_files() -> bool:
    """Whether this process writes files: it is the first of its group, or the only one."""
    return not many_processes() or torch.distributed.get_rank() == 0


def leave_group() -> None:
    """Leave the process group, if there is one. A process that ends inside its group may abort at exit."""
    if many_processes():
        torch.distributed.destroy_process_group()


@contextmanager
def all_wait_for_this() -> Iterator[None]:
    """Let all processes enter together and leave once every one has finished the block. If one fails, all fail."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, message in enumerate(errors):
        if message is not None:
            raise OSError(f"Process {number} failed: {message}")


def callers() -> Iterator[FrameType]:
    """The frames of the functions that are running now, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def running(function: Any) -> bool:
    """Whether the caller runs inside ``function``, at any depth."""
    return any(frame.f_code is function.__code__ for frame in callers())
