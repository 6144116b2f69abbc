"""The application that commands register with, and the arguments that several commands share.

Each command is a file in this folder that imports `app`. ``__init__.py`` imports these files in the order of
``--help``. Everything heavier than PyTorch is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TextIO

from rankwise import __version__
from rankwise.cli.failures import EXTRAS
from rankwise.config.suggest import nearest

try:
    import typer
except ImportError as missing:
    sys.exit(f"The command line needs {missing.name}. Install: {EXTRAS}")

app = typer.Typer(
    name="rankwise",
    help="Fine-tune models with low-rank adapters whose ranks are found, not guessed.",
    epilog="Exit codes: 0 done, 2 for mistakes that you can correct, 1 for a fault of rankwise, 130 after Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Replace keys of the recipe, as in `training.max_steps=50`. `~KEY` removes a key.",
        show_default=False,
    ),
]


def one_of(*names: str) -> Callable[[str], str]:
    """Return the parser of an option that takes one of ``names``. Its error suggests the nearest name."""

    def parse(value: str) -> str:
        if value in names:
            return value
        near = nearest(value, names, or_part=True)
        raise typer.BadParameter(
            f"{value!r} is not one of {', '.join(names)}." + (f" Did you mean {near!r}?" if near else "")
        )

    return parse


def takes_any_text(stream: TextIO) -> bool:
    """Whether a stream can encode any text. If it can't, `main` lets it write codes for the other letters."""
    return (stream.encoding or "utf-8").lower().startswith("utf")


def _version(asked: bool) -> None:
    if asked:
        print(f"rankwise {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
