"""Arguments and printing functions that the commands for trained adapters share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Table

Adapter = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER", help="The adapter's folder, written by rankwise or by PEFT.", show_default=False
    ),
]
DataFile = Annotated[str, typer.Argument(metavar="FILE", help="The data.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Replace keys of the adapter's recipe, as in `data.text=review` or `model=models/bert`.",
        show_default=False,
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE.yaml",
        help="The adapter's recipe, if its folder holds none. PEFT's folders hold none.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Examples per batch.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


def print_whole(table: Table, console: Console) -> None:
    """Print a table. In a pipe or a file, its lines are as long as they need to be."""
    if not console.is_terminal:
        from rich.measure import Measurement

        roomy = console.options.update(max_width=10_000)
        console.width = max(console.width, Measurement.get(console, roomy, table).maximum)
    console.print(table)


def say_notes(console: Console, notes: Iterable[str]) -> None:
    """Print notes for the user, one per line."""
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
