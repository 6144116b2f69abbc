"""``rankwise predict``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankwise.cli.adapters import Adapter, BatchSize, Overrides, Overwrite, RecipeOption, say_notes
from rankwise.cli.app import app, takes_any_text
from rankwise.cli.failures import failures


@app.command(
    epilog="Examples: `rankwise predict output/reviews new-reviews.csv -o predictions.csv`, and "
    '`rankwise predict output/reviews --text "A film to see twice."`'
)
def predict(
    adapter: Adapter,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="The data, or `-` for texts on the standard input, one per line.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="The table to write: `.csv`, `.tsv` or `.jsonl`. Default: JSON lines on the standard output.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeOption = None,
    batch_size: BatchSize = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="The most tokens that a model writes per example.", show_default=False
        ),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the probability of each label.")
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="TEXT", help="A text to predict, instead of FILE.", show_default=False
        ),
    ] = None,
    column: Annotated[str, typer.Option(metavar="NAME", help="The name of the new column.")] = "prediction",
    overwrite: Overwrite = False,
) -> None:
    """Predict every row of a file with an adapter: labels, numbers, tags, texts or transcripts.

    FILE is a table (CSV, JSON lines, Parquet) with the columns that the adapter was trained on, or a folder of
    texts, pictures or audio files. It needs no column of labels. The output has all columns of FILE, and a new column
    with the predictions.
    """
    with failures(), tempfile.TemporaryDirectory(prefix="rankwise-texts-") as typed:
        if text and file is not None and "=" in file:
            # With --text, the first argument is an override.
            overrides, file = [file, *(overrides or ())], None
        from rankwise.recipes.data.rows import count_rows
        from rankwise.recipes.predicting.predict import predict as predict_rows
        from rankwise.recipes.predicting.write import TABLE_ENDINGS, check_free, json_line, write_table

        if out is not None:
            reads = [] if file is None or file == "-" else [file]
            check_free(out, TABLE_ENDINGS, overwrite=overwrite, reads=reads)
        file = _source(adapter, file, text, overrides or (), recipe, Path(typed))
        console = Console(stderr=True)
        found = predict_rows(
            adapter, file, overrides or (), recipe=recipe, batch_size=batch_size, max_new_tokens=max_new_tokens,
            probabilities=probabilities, column=column, console=console,
        )  # fmt: skip
        say_notes(console, found.notes)
        if out is None:
            only_ascii = not takes_any_text(sys.stdout)
            for row in found.rows():
                sys.stdout.write(f"{json_line(row, only_ascii=only_ascii)}\n")
        else:
            write_table(found.columns, out)
            count = len(next(iter(found.columns.values())))
            console.print(f"{count_rows(count)}: {out}", highlight=False, soft_wrap=True, markup=False)


def _source(
    adapter: Path,
    file: str | None,
    texts: list[str] | None,
    overrides: Sequence[str],
    recipe: Path | None,
    folder: Path,
) -> str:
    """Return the file to predict: the given one, or a new one with the texts from --text or the standard input."""
    from rankwise.recipes.errors import RecipeError
    from rankwise.recipes.predicting.typed import write_typed

    if texts and file is not None:
        raise RecipeError(f"--text replaces a file, but the file {file!r} is given, too. Remove one of them.")
    if not texts and file is None and sys.stdin.isatty():
        raise RecipeError("FILE is missing: give a file, --text TEXT, or texts on the standard input.")
    if texts or file is None or file == "-":
        lines = texts or [line for line in sys.stdin.read().splitlines() if line.strip()]
        return str(write_typed(lines, folder, adapter, overrides, recipe))
    return file
