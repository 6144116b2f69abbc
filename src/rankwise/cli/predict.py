"""``rankwise predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankwise.cli.adapters import Adapter, BatchSize, DataFile, Overrides, Overwrite, RecipeOption, say_notes
from rankwise.cli.app import app
from rankwise.cli.failures import failures


@app.command()
def predict(
    adapter: Adapter,
    file: DataFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Write a table: `.csv`, `.tsv` or `.jsonl` (JSON lines). Left out, JSON lines on the standard output.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeOption = None,
    batch_size: BatchSize = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens that a model which writes may write.", show_default=False
        ),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Of labels, write the probability of each.")
    ] = False,
    column: Annotated[str, typer.Option(metavar="NAME", help="The name of the new column.")] = "prediction",
    overwrite: Overwrite = False,
) -> None:
    """Predict every row of a file with an adapter: labels, numbers, tags, texts or transcripts.

    FILE is a table (CSV, JSON lines, Parquet) with the columns that the adapter was trained on, or a folder of
    texts, pictures or audio files. What is to be predicted need not be in it. All its columns are kept, and the
    predictions put beside them.

    Example:
        rankwise predict output/reviews new-reviews.csv -o predictions.csv
    """
    with failures():
        from rankwise.recipes.predicting.predict import predict as predict_rows
        from rankwise.recipes.predicting.write import TABLE_ENDINGS, check_free, json_line, write_table

        if out is not None:
            check_free(out, TABLE_ENDINGS, overwrite=overwrite, reads=[file])
        console = Console(stderr=True)
        found = predict_rows(
            adapter, file, overrides or (), recipe=recipe, batch_size=batch_size, max_new_tokens=max_new_tokens,
            probabilities=probabilities, column=column, console=console,
        )  # fmt: skip
        say_notes(console, found.notes)
        if out is None:
            for row in found.rows():
                sys.stdout.write(f"{json_line(row)}\n")
        else:
            write_table(found.columns, out)
            count = len(next(iter(found.columns.values())))
            console.print(f"{count:,} rows: {out}", highlight=False, soft_wrap=True, markup=False)
