"""``rankwise report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankwise.cli.app import app
from rankwise.cli.failures import failures


@app.command(epilog="An example: rankwise report adapter other-adapter -o report.html")
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER...", help="Adapters' folders, checkpoints, or sweeps.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.html", help="The page to write.")
    ] = Path("report.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
) -> None:
    """Write a page about one or several adapters, to look at in a browser; it needs no network.

    The rank of each layer with a slider over the steps, budget and loss over the run, what the layers learned (the
    spectra of their updates), where the parameters went, the metrics and the recipe. Several runs stand side by side.
    """
    with failures(ValueError, TypeError, OSError):
        from rankwise.report.html import write_report

        write_report(folders, out, overwrite=overwrite)
        Console().print(f"Report: {out}", highlight=False, soft_wrap=True)
