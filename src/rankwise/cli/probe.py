"""``rankwise probe``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankwise.cli.app import Overrides, RecipeFile, app
from rankwise.cli.failures import failures


@app.command(epilog="Example: `rankwise probe reviews.yaml --parameters 100000 -o plan.yaml`")
def probe(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="PLAN.yaml", help="Write the plan.", show_default=False),
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(metavar="N", help="The budget, in parameters.", show_default=False)
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--bytes", metavar="N", help="The budget, in bytes of the adapter's file.", show_default=False
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Keep this share of the gradient's squared norm, such as 0.9.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="The plan gets as many parameters as LoRA of this rank has. Default: the recipe's rank.",
            show_default=False,
        ),
    ] = None,
    batches: Annotated[int, typer.Option(metavar="N", min=1, help="Batches to average over.")] = 8,
    max_rank: Annotated[int, typer.Option(metavar="R", min=1, help="The highest rank of a layer.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print spectra and plan as JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace PLAN.yaml if it exists.")] = False,
) -> None:
    """Show before training which layers will use rank, and plan ranks for a budget.

    The command averages the gradient of each target layer over a few batches. It shows how large the gradient is, and
    in how many directions it acts. To use the plan in a recipe, write `adapter: {method: lora, plan: PLAN.yaml}`.
    """
    with failures(ValueError, TypeError):
        from rankwise.recipes import load_recipe
        from rankwise.recipes.predicting.write import check_free
        from rankwise.recipes.probing import probe_recipe, rank_of

        if out is not None:
            check_free(out, [".yaml", ".yml"], overwrite=overwrite, reads=[recipe])
        read = load_recipe(recipe, overrides or ())
        goal = {"parameters": parameters, "bytes": size, "keep": keep, "rank": rank}
        if not any(value is not None for value in goal.values()):
            goal["rank"] = rank_of(read)
        found = probe_recipe(read, batches=batches, max_rank=max_rank)
        planned = found.plan(**goal)  # type: ignore[arg-type]
        if out is not None:
            planned.save(out)
        if as_json:
            print(json.dumps({**found.to_dict(), "plan": planned.to_dict()}, indent=2))
            return
        sys.stdout.write(f"{found.table(planned)}\n")
        if found.left_out:
            print(f"Left out, because they are not linear layers: {', '.join(found.left_out)}")
        if out is not None:
            Console(stderr=True).print(f"Plan: {out}", highlight=False, soft_wrap=True, markup=False)
