"""``rankwise sweep``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.adapters import print_whole, say_notes
from rankwise.cli.app import Overrides, RecipeFile, app, one_of
from rankwise.cli.failures import failures

SAMPLERS = ("tpe", "gp", "random", "qmc", "grid")
PRUNERS = ("median", "halving", "hyperband", "none")


def _share(text: str) -> float:
    """Read a share that is given as a number or in percent."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a share: write 1% or 0.01.") from None


@app.command(
    epilog="Example: `rankwise sweep reviews.yaml --over training.learning_rate=1e-4..1e-2 "
    "--over adapter.target_r=1,2,4,8`"
)
def sweep(
    recipe: RecipeFile,
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="KEY=LOW..HIGH",
            help="A key to vary: a range or a list KEY=A,B,C. Default: learning rate and rank, around the recipe's.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[int, typer.Option(metavar="N", min=1, help="Trials in total, LoRA's included.")] = 20,
    metric: Annotated[str, typer.Option(metavar="NAME", help="The held-out metric to compare by.")] = "loss",
    beside: Annotated[
        str,
        typer.Option(
            parser=one_of("lora", "none"),
            metavar="METHOD",
            help="lora: every second trial is LoRA with as many parameters. none: no trial is LoRA.",
        ),
    ] = "lora",
    within: Annotated[
        float,
        typer.Option(
            parser=_share,
            metavar="SHARE",
            help="The smallest adapter may be this much worse than the best one, such as 1%.",
        ),
    ] = "1%",  # type: ignore[assignment]  # a text, which the parser reads
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="The folder to write. Default: the recipe's `output` with `-sweep` appended.",
            show_default=False,
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An Optuna storage that several machines share. Default: a SQLite file in OUT.",
            show_default=False,
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The study's name. Default: OUT's name.", show_default=False),
    ] = None,
    sampler: Annotated[
        str,
        typer.Option(
            parser=one_of(*SAMPLERS), metavar="NAME", help=f"Optuna's sampler: {', '.join(SAMPLERS)}."
        ),
    ] = "tpe",
    pruner: Annotated[
        str,
        typer.Option(
            parser=one_of(*PRUNERS),
            metavar="NAME",
            help=f"Optuna's pruner, which stops trials that fall behind: {', '.join(PRUNERS)}.",
        ),
    ] = "median",
    as_json: Annotated[bool, typer.Option("--json", help="Print the trials as JSON, for programs.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the earlier sweep of this name and start over.")
    ] = False,
) -> None:
    """Find the learning rate, the rank or other settings that serve your data best.

    Optuna chooses the settings of many short runs by their held-out loss. By default every second run is LoRA with as
    many parameters. The command shows the trials, the frontier of loss against parameters, and the smallest adapter
    within a tolerance of the best. It writes a recipe that repeats this adapter's run. After Ctrl-C, the same command
    resumes the sweep.
    """
    with failures(kept="Finished trials are kept: the same command continues the sweep."):
        from rankwise.recipes.console import lasting_console
        from rankwise.recipes.sweep import sweep as run

        console = lasting_console(stderr=as_json)
        outcome = run(
            recipe, overrides or (), over=over or (), trials=trials, metric=metric, beside=beside, within=within,
            storage=storage, name=study, output=output, sampler=sampler, pruner=pruner, overwrite=overwrite,
            console=console,
        )  # fmt: skip
    if as_json:
        print(json.dumps(outcome.to_dict(), indent=2))
    else:
        print_whole(outcome.table(), console)
        say_notes(console, ("", *outcome.lines()))
    if outcome.interrupted is not None:
        command = shlex.join(["rankwise", *sys.argv[1:]])
        console.print(
            f"\nStopped. To continue:\n\n  {command}\n", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(128 + outcome.interrupted)
    folder = shlex.quote(str(outcome.folder))
    if not as_json and outcome.smallest is not None:
        said = f"\nThe smallest adapter: {folder}/trials/{outcome.smallest.name}. Repeat its run, or see all trials:\n"
        commands = (f"rankwise train {folder}/recipe.yaml", f"rankwise report {folder} -o sweep.html")
        console.print("\n  ".join([said, *commands]), markup=False, highlight=False, soft_wrap=True)
