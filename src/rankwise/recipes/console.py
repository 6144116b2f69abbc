"""A console for runs of hours. If its pipe, terminal or disk fails, the run goes on without it."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO, cast

from rich.console import Console

from rankwise.files.streams import discard


def lasting_console(stderr: bool = False) -> Console:
    """A console that never ends a run: after an error, what it prints is dropped.

    Args:
        stderr: whether to print on the standard error. False: on the standard output.
    """
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr) if stream is None else Console(file=cast("TextIO", _Lasting(stream)))


class _Lasting:
    """A stream whose errors are reported once, on the standard error, and not raised.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._works = stream, True

    def write(self, text: str) -> int:
        if self._works:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if self._works:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        self._works = False
        with contextlib.suppress(OSError):
            print(
                f"The output can't be written ({error.strerror}): the run goes on without it.",
                file=sys.stderr,
            )
        discard(self._stream)
