"""``rankwise report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankwise.cli.adapters import say_notes
from rankwise.cli.app import app
from rankwise.cli.failures import failures


@app.command(epilog="Example: `rankwise report adapter other-adapter -o report.html`")
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER...", help="Folders of adapters, checkpoints or sweeps.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.html", help="The page to write.")
    ] = Path("report.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
) -> None:
    """Write a page about one or several adapters, to open in a browser without a network.

    The page shows the rank of each layer at any step, the budget and the loss over the run, the spectra of the layers'
    updates, the share of parameters in each layer, the metrics and the recipe. Several runs are shown side by side.
    """
    with failures(ValueError, TypeError, OSError):
        from rankwise.report.html import write_report

        write_report(folders, out, overwrite=overwrite)
        say_notes(Console(), [f"Report: {out}"])
