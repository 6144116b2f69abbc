"""``rankwise compress``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rankwise.cli.adapters import Adapter, Overwrite, RecipeOption, print_whole
from rankwise.cli.app import app
from rankwise.cli.failures import failures

if TYPE_CHECKING:
    from rankwise.recipes.predicting.measure import Measured
    from rankwise.storage.compress import Compression


_NUMBERS = 42  # width in characters of the columns of numbers, next to the column of layer paths


@app.command(epilog="Example: `rankwise compress output/reviews --rank 4 -o output/reviews-rank4`")
def compress(
    adapter: Adapter,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="The folder to write.", show_default=False),
    ] = None,
    rank: Annotated[
        float | None,
        typer.Option(
            "--rank",
            metavar="R",
            help="Keep as many parameters as LoRA of this rank has.",
            show_default=False,
        ),
    ] = None,
    parameters: Annotated[
        int | None,
        typer.Option(
            "--parameters", metavar="N", help="Keep at most this many parameters.", show_default=False
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep",
            metavar="SHARE",
            help="Keep this share of the update's squared norm, such as 0.95.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show how much each size would lose. Write nothing.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Measure the adapter on this data before and after, as `rankwise evaluate` does.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeOption = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")] = False,
) -> None:
    """Cut an adapter to a size, and keep as much of its update as LoRA of that size can hold.

    Give one of --rank, --parameters and --keep. Each layer gets its own rank: over all layers, the command keeps the
    directions that hold most of the update for their number of parameters. It shows the share of the update's squared
    norm that is lost, in each layer and in total. The result is a plain LoRA adapter that PEFT and rankwise load.
    """
    with failures(ValueError, TypeError, OSError):
        from rankwise.storage.compress import Spectra, compress_adapter
        from rankwise.storage.updates import read_updates

        goal: dict[str, Any] = {"rank": rank, "parameters": parameters, "keep": keep}
        given = any(value is not None for value in goal.values())
        if dry_run:
            spectra = Spectra(read_updates(adapter))
            curve = spectra.curve()
            if given:
                curve.append(spectra.compression(spectra.ranks(**goal)))
            show_curve(sorted(curve, key=lambda each: each.parameters), as_json)
            return
        if not given or output is None:
            missing = "-o OUT, the folder to write" if given else "--rank, --parameters or --keep"
            raise ValueError(
                f"{missing} is missing. --dry-run shows what each size would lose, and writes nothing."
            )
        compression = compress_adapter(output, adapter, **goal, overwrite=overwrite)
        measured = None if data is None else _measure(adapter, output, data, recipe)
    if as_json:
        metrics = {} if measured is None else {"metrics": [each.values for each in measured]}
        print(json.dumps(compression.to_dict() | metrics, indent=2))
        return
    show(compression, output)
    if measured is not None:
        show_metrics(*measured)


def _measure(adapter: Path, output: Path, data: str, recipe: Path | None) -> tuple[Measured, Measured]:
    """Return the metrics of the adapter and of the compressed adapter."""
    from rankwise.recipes.predicting.measure import evaluate

    return evaluate(adapter, data, recipe=recipe), evaluate(output, data, recipe=recipe)


def show_metrics(before: Measured, after: Measured) -> None:
    """Print the metrics before and after, side by side."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for metric in before.metrics:
        values = (each.values[metric.key] for each in (before, after))
        table.add_row(metric.title, *(format(value, metric.style) for value in values))
    console = Console()
    console.print(f"\nOn {before.examples:,} examples of {before.file}", markup=False, highlight=False)
    console.print(table)


def show(compression: Compression, output: Path) -> None:
    """Print the ranks, parameters and losses of each layer, and the totals."""
    from rich.table import Table

    from rankwise.run.summary import paths_that_fit

    layers, console = compression.layers, Console()
    paths = [each.path for each in layers]
    if console.is_terminal:
        paths = paths_that_fit(paths, max(20, console.width - _NUMBERS))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("layer", overflow="fold")
    for name in ("rank", "before", "parameters", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for path, layer in zip(paths, layers, strict=True):
        table.add_row(
            path, str(layer.rank), str(layer.rank_before), f"{layer.parameters:,}", f"{layer.lost:.2%}"
        )
    print_whole(table, console)
    before = compression.parameters_before
    console.print(
        f"\n{compression.parameters:,} of {before:,} parameters ({compression.parameters / before:.0%}); lost "
        f"{compression.lost:.2%} of the update's squared norm. Saved to {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def show_curve(curve: list[Compression], as_json: bool) -> None:
    """Print the loss at each size."""
    if as_json:
        points = [{"parameters": each.parameters, "lost": each.lost} for each in curve]
        print(json.dumps(points, indent=2))
        return
    from rich.table import Table

    console = Console()
    widest = min(30, max(0, console.width - 55)) if console.is_terminal else 30
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("parameters", "of the present", "average rank", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for each in curve:
        mean = sum(layer.rank for layer in each.layers) / len(each.layers)
        table.add_row(
            f"{each.parameters:,}",
            f"{each.parameters / each.parameters_before:.0%}",
            f"{mean:.1f}",
            f"{each.lost:.2%}",
            "█" * round(widest * each.lost),
        )
    print_whole(table, console)
