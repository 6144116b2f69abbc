"""``rankwise watch``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rankwise.cli.app import app
from rankwise.cli.failures import failures


@app.command(epilog="Example: `rankwise watch output/reviews`")
def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The run's output folder.", show_default=False)
    ],
    once: Annotated[
        bool, typer.Option("--once", help="Show the current state of the run, and exit.")
    ] = False,
    every: Annotated[
        float,
        typer.Option("--every", metavar="SECONDS", min=0.1, help="Time between two readings of the folder."),
    ] = 2.0,
) -> None:
    """Watch a run in another process: its step, losses, budget, and the rank of every layer.

    The command reads the output folder of `rankwise train`, which the run updates whenever it logs. It also reads the
    checkpoints of any trainer. It ends with the run or with Ctrl-C, and never touches the run. In a pipe, it prints a
    line for each change.
    """
    with failures(ValueError, TypeError, OSError):
        from rankwise.report.watch import read_run_now

        console = Console()
        now = read_run_now(folder)
        if once or now.finished or now.stopped:
            console.print(_view(now))
            return
        if not console.is_terminal:
            _print_changes(console, folder, every)
            return
        with Live(_view(now), console=console, refresh_per_second=4) as live:
            while not (now.finished or now.stopped):
                time.sleep(every)
                now = read_run_now(folder)
                live.update(_view(now))


def _print_changes(console: Console, folder: Path, every: float) -> None:
    from rankwise.report.watch import read_run_now

    shown = None
    while True:
        now = read_run_now(folder)
        state = (now.step, now.finished, now.stopped)
        if state != shown:
            console.print(now.line(), highlight=False, soft_wrap=True)
            shown = state
        if now.finished or now.stopped:
            console.print("", _view(now), sep="\n")
            return
        time.sleep(every)


def _view(now: Any) -> Group:
    from rankwise.report.terminal import rank_picture

    parts = [Text(now.line(), "bold"), Text(f"{now.source}", "dim")]
    if now.ranks is None:
        return Group(*parts, Text("Nothing is logged yet."))
    return Group(*parts, Text(""), rank_picture(now.ranks), Text(now.ranks.totals(), "dim"))
