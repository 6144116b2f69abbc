"""Output streams that can no longer be written."""

from __future__ import annotations

import contextlib
import os
from typing import TextIO


def discard(stream: TextIO) -> None:
    """Discard what a stream still buffers and all that is written to it later.

    After a write has failed, Python would try to write the buffer again when it ends, and report the error once more.
    """
    with contextlib.suppress(OSError, ValueError):  # a stream without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
