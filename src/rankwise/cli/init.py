"""``rankwise init``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankwise.cli.adapters import say_notes
from rankwise.cli.app import app
from rankwise.cli.failures import failures


@app.command(epilog="Example: `rankwise init reviews.csv -o reviews.yaml`")
def init(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A table (CSV, JSON lines, Parquet), a folder, or a dataset.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--output", metavar="RECIPE.yaml", help="The recipe to write.")
    ] = Path("recipe.yaml"),
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model to start from. Default: a small one for the task.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe if it exists.")] = False,
) -> None:
    """Write a first recipe for your data.

    The command looks at a table or at a folder of texts, pictures or audio files. It guesses the task, the columns and
    a model to start from, and says what it guessed. Then it writes a commented recipe for you to change. It asks no
    questions.
    """
    with failures():
        from rankwise.recipes.starting import start_recipe

        guess = start_recipe(data, out, model=model, overwrite=overwrite)
    commands = (f"  rankwise {command} {shlex.quote(str(out))}" for command in ("plan", "train", "sweep"))
    lines = (f"task: {guess.task}", *guess.why, f"Recipe: {out}", "", "What next", *commands)
    say_notes(Console(), lines)
