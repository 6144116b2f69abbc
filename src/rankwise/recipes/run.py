"""Train a recipe, read from top to bottom: check, read the data, plan, load, adapt, evaluate, train, save, report."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.recipes.errors import Problem, RecipeError
from rankwise.recipes.interrupt import Interruption
from rankwise.recipes.models import model_place, new_weights, quiet
from rankwise.recipes.output import Output
from rankwise.recipes.plan import Plan, attach, make_plan
from rankwise.recipes.recipe import BaseRecipe
from rankwise.recipes.tasks import Metric, Task, TaskData, load_task

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Args:
        folder: where the adapter is, or the checkpoint to go on from.
        interrupted: the number of the signal that stopped the run before its end, or None.
        before: the metrics before training.
        after: the metrics after training; empty if it was interrupted.
        trainable_parameters: how many numbers train in the end.
    """

    folder: Path
    interrupted: int | None
    before: Mapping[str, float]
    after: Mapping[str, float]
    trainable_parameters: int


def plan(recipe: BaseRecipe) -> Plan:
    """Read a recipe's data and plan its run, without loading weights.

    Raises:
        RecipeError: the data, the schedule or the adapter can't be used.
    """
    task = load_task(recipe.task)
    data = task.read_data(recipe)
    with quiet():
        return make_plan(recipe, data, task.processor(recipe), processes())


def train(
    recipe: BaseRecipe, *, console: Console | None = None, resume: bool = False, overwrite: bool = False
) -> Result:
    """Train a recipe.

    Args:
        recipe: what `load_recipe` returned.
        console: where to show what happens; None for the standard output. Only the main process shows anything.
        resume: go on from the newest whole checkpoint in the output folder; from the start if there is none.
        overwrite: replace what an earlier run left in the output folder.

    Raises:
        RecipeError: the data, the adapter or the output folder can't be used.
        KeyboardInterrupt: stopped by a signal where there was nothing to save.
    """
    console = _console(console)
    output = Output(recipe)
    if is_main_process():
        output.check(resume=resume, overwrite=overwrite)
    if resume and output.finished:
        return _nothing_left(output, console)
    with Interruption() as interruption, quiet():
        return _train(recipe, console, output, resume, interruption)


def _train(
    recipe: BaseRecipe, console: Console, output: Output, resume: bool, interruption: Interruption
) -> Result:
    # What the run is about to do. Everything that can be wrong with the recipe shows here, in seconds.
    task = load_task(recipe.task)
    with console.status("reading the data"):
        data = task.read_data(recipe)
        processor = task.processor(recipe)
        planned = make_plan(recipe, data, processor, processes())
    console.print(planned)

    # The model with its adapters, and the trainer.
    from transformers import PrinterCallback, Trainer, set_seed

    from rankwise.recipes.progress import LiveProgress, StopWhenAsked

    set_seed(recipe.training.seed)
    with console.status("loading the model"):
        model = task.new_model(recipe, data, processor, weights=True)
        _say_new_weights(console, model, planned.modules_to_save)
        model, _ = attach(recipe, model, planned.total_step)
        for_task, notes = task.trainer_arguments(recipe, data, processor, model)
    for note in notes:
        console.print(note, highlight=False)
    arguments = training_arguments(recipe, planned.total_step, output.folder)
    checkpoint = _checkpoint(output, console) if resume else None
    if checkpoint is None and is_main_process():
        output.begin()
    metrics = task.metrics(recipe)
    with LiveProgress(console, [(metric.key, metric.title, metric.style) for metric in metrics]) as progress:
        stop = StopWhenAsked(interruption, progress.say)
        trainer = Trainer(model=model, args=arguments, callbacks=[stop, progress], **for_task)
        trainer.remove_callback(PrinterCallback)

        # How good it is before, the training itself, the adapter on disk, and how good it is then.
        before = output.results.get("before") if checkpoint else None
        if before is None and checkpoint is None:
            before = _evaluate(trainer, metrics)
        started = _started(output, before)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if interruption.number is not None and trainer.state.global_step < planned.total_step:
            return _interrupted(output, console, interruption.number, before or {}, trainer)
        if is_main_process():
            save(model, processor, output.folder)
        after = _evaluate(trainer, metrics)

    return _finish(task, recipe, data, console, output, trainer, metrics, before or {}, after, started)


def is_main_process() -> bool:
    """Whether this is the process that talks and writes, of those that torchrun may have started."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def training_arguments(recipe: BaseRecipe, total_step: int, folder: Path) -> Any:
    """Transformers' arguments for a recipe.

    Raises:
        RecipeError: Transformers refuses them.
    """
    import torch
    from transformers import TrainingArguments

    fields = recipe.training.model_dump()
    fields.pop("num_train_epochs")
    checkpointing = fields.pop("gradient_checkpointing")
    if checkpointing:
        name = (
            "gradient"
            if "activation_checkpointing" not in TrainingArguments.__dataclass_fields__
            else "activation"
        )
        fields |= {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    share = fields["warmup_steps"]
    fields |= {
        "output_dir": str(folder),
        "max_steps": total_step,
        "warmup_steps": round(share * total_step) if isinstance(share, float) and share < 1 else int(share),
        "eval_strategy": "no" if fields["eval_steps"] is None else "steps",
        "save_strategy": "no" if fields["save_steps"] is None else "steps",
        "save_steps": fields["save_steps"] or 500,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,
    }
    try:
        arguments = TrainingArguments(**fields)
    except (ValueError, ImportError) as error:
        raise RecipeError([Problem("training", str(error))], str(recipe.source)) from error
    if processes() == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = (
            1  # several GPUs are for torchrun: nn.DataParallel would copy the adapters at every step
        )
    return arguments


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write the adapter, and what using it needs: the tokenizer, and the configuration with the labels' names."""
    processor.save_pretrained(str(folder))
    model.config.save_pretrained(str(folder))
    model.save_pretrained(str(folder))


def _evaluate(trainer: Any, metrics: Sequence[Metric]) -> dict[str, float]:
    found = trainer.evaluate()
    keys = dict.fromkeys(["loss", *(metric.key for metric in metrics)])
    return {key: float(found[f"eval_{key}"]) for key in keys if f"eval_{key}" in found}


def _started(output: Output, before: Mapping[str, float] | None) -> float:
    if is_main_process():
        output.write_results({"finished": False, "before": before})
    return time.monotonic()


def _checkpoint(output: Output, console: Console) -> Path | None:
    checkpoint, broken = output.newest_checkpoint()
    for path in broken:
        console.print(f"{path.name} was cut short while it was written, and is left out.", highlight=False)
    if checkpoint is None:
        console.print(
            f"There is no checkpoint in {output.folder} yet: starting from the beginning.", highlight=False
        )
    else:
        console.print(f"Going on from {checkpoint.name}.", highlight=False)
    return checkpoint


def _say_new_weights(console: Console, model: Any, modules_to_save: Sequence[str]) -> None:
    """Tell of weights that are random and would stay so."""
    frozen = [name for name in new_weights(model) if not set(name.split(".")) & set(modules_to_save)]
    if frozen:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in frozen)
        console.print(
            f"[yellow]Random and frozen:[/] the checkpoint has no weights for {', '.join(modules)}. "
            "To train them, name them in adapter.modules_to_save.",
            highlight=False,
        )


# --- what is said in the end -------------------------------------------------------------------------------------


def _finish(
    task: Task,
    recipe: BaseRecipe,
    data: TaskData,
    console: Console,
    output: Output,
    trainer: Any,
    metrics: Sequence[Metric],
    before: Mapping[str, float],
    after: Mapping[str, float],
    started: float,
) -> Result:
    from rich.text import Text

    from rankwise.report.terminal import rank_picture, rank_table

    summary, seconds = trainer.model.rank_summary(), time.monotonic() - started
    trainable, everything = trainer.model.get_nb_trainable_parameters()
    if is_main_process():
        output.write_results(
            {
                "finished": True,
                "before": before,
                "after": after,
                "trainable_parameters": trainable,
                "all_parameters": everything,
                "steps": trainer.state.global_step,
                "seconds": round(seconds, 1),
                "ranks": summary.to_dict(),
                "log": trainer.state.log_history,
            }
        )
    console.print()
    console.print(rank_table(summary))
    console.print()
    console.print(rank_picture(summary))
    console.print()
    console.print(_comparison(metrics, before, after, len(data.evaluation)))
    console.print(
        f"Trained {trainable:,} of {everything:,} parameters in {_duration(seconds)}.", highlight=False
    )
    console.print(f"Saved to [bold]{output.folder}[/]\n", highlight=False)
    place = model_place(recipe)
    base = place.name if place.path is None else str(place.path)
    console.print("[bold]What next[/]", highlight=False)
    for command in (
        f"rankwise inspect {shlex.quote(str(output.folder))}",
        f"rankwise inspect {shlex.quote(str(output.folder))} --plot ranks.png",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    console.print("\nIn Python:", highlight=False)
    for line in task.usage(recipe, data, base, str(output.folder)).splitlines():
        console.print(Text(f"  {line}"), soft_wrap=True)
    return Result(output.folder, None, before, after, trainable)


def _comparison(
    metrics: Sequence[Metric], before: Mapping[str, float], after: Mapping[str, float], rows: int
) -> Any:
    """A table of the metrics before and after."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), title=f"On {rows:,} held-out examples")
    table.title_justify, table.title_style = "left", "bold"
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for metric in metrics:
        values = [
            format(side[metric.key], metric.style) if metric.key in side else "-" for side in (before, after)
        ]
        table.add_row(metric.title, values[0], f"[bold]{values[1]}[/]")
    return table


def _interrupted(
    output: Output, console: Console, number: int, before: Mapping[str, float], trainer: Any
) -> Result:
    checkpoint, _ = output.newest_checkpoint()
    recipe = output.recipe
    command = shlex.join(["rankwise", "train", str(recipe.source), *recipe.overrides, "--resume"])
    console.print(
        f"\nStopped after step {trainer.state.global_step:,} of {trainer.state.max_steps:,}; saved."
    )
    console.print("To go on:\n", highlight=False)
    console.print(f"  {command}\n", highlight=False, soft_wrap=True)
    trainable, _ = trainer.model.get_nb_trainable_parameters()
    return Result(checkpoint or output.folder, number, before, {}, trainable)


def _nothing_left(output: Output, console: Console) -> Result:
    results = output.results
    console.print(
        f"The run in {output.folder} is finished: there is nothing to resume. To train it again, use --overwrite.",
        highlight=False,
    )
    return Result(
        output.folder,
        None,
        results.get("before") or {},
        results.get("after") or {},
        int(results.get("trainable_parameters") or 0),
    )


def _console(console: Console | None) -> Console:
    from rich.console import Console

    return (console or Console()) if is_main_process() else Console(quiet=True)


def _duration(seconds: float) -> str:
    """A duration for people.

    Example:
        >>> _duration(8.24), _duration(83), _duration(4000)
        ('8.2 s', '1 min 23 s', '1 h 6 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
