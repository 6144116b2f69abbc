"""``rankwise inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankwise.cli.adapters import say_notes
from rankwise.cli.app import app
from rankwise.cli.failures import failures


@app.command()
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The adapter's folder.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, for programs.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw the ranks as a heat map of blocks by module names.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what an adapter's folder holds: base model, method, rank of every layer, parameters, file sizes."""
    with failures(ValueError, TypeError, OSError):
        from rankwise.report.inspect import inspect_adapter
        from rankwise.report.show import render_terminal, save_heatmap

        if plot is not None and not plot.suffix:
            raise ValueError(f"--plot {plot}: its ending says the format. Give one such as {plot}.png.")
        report = inspect_adapter(folder)
        if as_json:
            print(json.dumps(report.to_dict(), indent=2))
        else:
            render_terminal(report, Console())
        if plot is not None:
            save_heatmap(report, plot)
            say_notes(Console(stderr=as_json), [f"Heat map: {plot}"])
