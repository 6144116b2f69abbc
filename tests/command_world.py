"""Real commands in processes of their own, which end with the test that started them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rankwise

SOURCE = Path(rankwise.__file__).parent.parent


@contextmanager
def running(*words: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run ``rankwise`` with these words. The process is killed if it has not ended when the block is left."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, "-m", "rankwise", *map(str, words)]
    with subprocess.Popen(command, text=True, env=environment, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> None:
    """Read what the process prints up to a line with this beginning."""
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith(beginning):
        assert line, f"The command ended and printed no line that begins with {beginning!r}."
