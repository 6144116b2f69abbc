"""``rankwise plan``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from rankwise.cli.app import Overrides, RecipeFile, app
from rankwise.cli.failures import failures


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, for programs.")] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Only estimate the memory, from the model's config.json. Needs neither data nor weights.",
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--time", help="Train a few steps to estimate how long the run takes. Writes nothing."),
    ] = False,
) -> None:
    """Show what a recipe would do, without training.

    The plan shows the phases, the budget over the steps, the ranks, the trainable parameters at the start and at the
    end, and an estimate of the memory. The data is read and checked. No weights are loaded.
    """
    with failures():
        from rankwise import recipes

        if measure and memory:
            raise recipes.RecipeError(
                "--time reads data and weights, and --memory reads neither: choose one."
            )
        read = recipes.load_recipe(recipe, overrides or (), data_needed=not memory)
        planned = recipes.plan_memory(read) if memory else recipes.plan(read)
        timing = None
        if measure:
            from rankwise.recipes.timing import measure_time

            timing = measure_time(read)
    if as_json:
        print(json.dumps(planned.to_dict() | ({"time": timing.to_dict()} if timing else {}), indent=2))
        return
    Console().print(planned)
    if timing is not None:
        Console().print(f"\ntime: {timing.line()}", highlight=False, soft_wrap=True)
