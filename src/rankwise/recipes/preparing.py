"""Progress bars for the preparation of data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")
_progress: ContextVar[Any] = ContextVar("preparation", default=None)


@contextlib.contextmanager
def preparing(console: Console, what: str) -> Iterator[None]:
    """Show ``what`` while the block runs, and a bar for each `tracked` in it. In a file or a pipe, show nothing."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), *columns,
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    token = _progress.set(progress)
    try:
        with progress:
            progress.add_task(what, total=None)
            yield
    finally:
        _progress.reset(token)


def tracked(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Yield ``items``, and show in a bar of the enclosing `preparing` how many of ``total`` are done.

    Example:
        >>> sum(tracked([1, 2, 3], "adding", total=3))
        6
    """
    progress = _progress.get()
    if progress is None:
        yield from items
        return
    task = progress.add_task(what, total=total)
    for item in items:
        yield item
        progress.advance(task)
