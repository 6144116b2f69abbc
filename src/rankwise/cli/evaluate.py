"""``rankwise evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankwise.cli.adapters import Adapter, BatchSize, DataFile, Overrides, Overwrite, RecipeOption, say_notes
from rankwise.cli.app import app
from rankwise.cli.failures import failures


@app.command(epilog="Example: `rankwise evaluate output/reviews new-reviews.csv -o metrics.json`")
def evaluate(
    adapter: Adapter,
    file: DataFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT.json", help="Also write the metrics as JSON.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON, for programs.")] = False,
    recipe: RecipeOption = None,
    batch_size: BatchSize = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw the confusion matrix of labels, or true against predicted numbers.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure an adapter on new data with its task's metrics, and show its worst mistakes.

    FILE is anything that `data.train` may be in a recipe: a table or a folder, with the true labels or texts.
    """
    with failures(ValueError):
        from rankwise.files.atomic import write_file
        from rankwise.recipes.details import lines, save_plot
        from rankwise.recipes.errors import RecipeError
        from rankwise.recipes.predicting.measure import evaluate as measure
        from rankwise.recipes.predicting.write import check_free
        from rankwise.recipes.samples import sample_lines

        if out is not None:
            check_free(out, [".json"], overwrite=overwrite, reads=[file])
        console = Console(stderr=True)
        found = measure(adapter, file, overrides or (), recipe=recipe, batch_size=batch_size, console=console)
        say_notes(console, found.notes)
        text = json.dumps(found.to_dict(), indent=2)
    if as_json:
        print(text)
    else:
        title = f"On {found.examples:,} examples of {file}"
        console = Console()
        console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(found.table())
        for part in lines(found.details) if found.details else ():
            console.print(part, markup=False, highlight=False)
        say_notes(console, sample_lines([{**each, "after": each["written"]} for each in found.samples]))
    # Files come last, so that an error here loses none of the measurements.
    with failures(ValueError):
        if out is not None:
            write_file(out, f"{text}\n")
        if plot is not None:
            if found.details is None:
                raise RecipeError("This task has no picture: --plot is for labels and numbers.")
            save_plot(found.details, plot)
