"""Train a recipe, read from top to bottom: check, read the data, plan, load, adapt, evaluate, train, save, report."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.recipes.card import card_of
from rankwise.recipes.details import Details, Keep, details_of
from rankwise.recipes.divergence import (
    DivergedError,
    diverged,
    has_diverged,
    highest_sound_loss,
    looks_diverged,
)
from rankwise.recipes.errors import RecipeError
from rankwise.recipes.interrupt import Interruption
from rankwise.recipes.memory.estimate import Memory
from rankwise.recipes.models import model_place, new_weights, quiet
from rankwise.recipes.output import Output
from rankwise.recipes.plan import Plan, attach, factor_parameters, make_plan, memory_plan
from rankwise.recipes.preparing import preparing
from rankwise.recipes.recipe import BaseRecipe
from rankwise.recipes.samples import Sample, before_and_after, sample_lines, write_samples
from rankwise.recipes.tasks import Metric, TaskData, load_task
from rankwise.recipes.training import (
    device_problem,
    is_main_process,
    metric_keys,
    processes,
    refusals,
    training_arguments,
)
from rankwise.storage.finite import NotFiniteError

if TYPE_CHECKING:
    from rich.console import Console

    from rankwise.recipes.best import Best


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Args:
        folder: where the adapter is, or the checkpoint to go on from.
        interrupted: the number of the signal that stopped the run before its end, or None.
        before: the metrics before training.
        after: the metrics after training; empty if it was interrupted.
        trainable_parameters: how many numbers trained.
        kept_parameters: how many of them the adapter keeps after pruning.
        samples: what the model wrote before and after, for tasks in which it writes.
        best: the evaluation whose adapter is kept; None where that is the last one, unseen.
    """

    folder: Path
    interrupted: int | None
    before: Mapping[str, float]
    after: Mapping[str, float]
    trainable_parameters: int
    kept_parameters: int
    samples: Sequence[Sample] = ()
    best: Best | None = None


def plan(recipe: BaseRecipe) -> Plan:
    """Read a recipe's data and plan its run, without loading weights.

    Raises:
        RecipeError: the data, the schedule or the adapter can't be used.
    """
    from rich.console import Console

    task = load_task(recipe.task)
    # On the standard error, since the plan itself may go into a file.
    with preparing(Console(stderr=True), "reading the data"), quiet():
        data = task.read_data(recipe)
        return make_plan(recipe, data, task.processor(recipe), processes(), memory=True)


def plan_memory(recipe: BaseRecipe) -> Memory:
    """Estimate the memory that a recipe takes from its model's configuration, without data and weights.

    Raises:
        RecipeError: the adapter can't be used.
    """
    with quiet():
        return memory_plan(recipe, processes())


def train(
    recipe: BaseRecipe,
    *,
    console: Console | None = None,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Any] = (),
    compare: bool = True,
) -> Result:
    """Train a recipe.

    Args:
        recipe: what `load_recipe` returned.
        console: where to show what happens; None for the standard output. Only the main process shows anything.
        resume: go on from the newest whole checkpoint in the output folder; from the start if there is none.
        overwrite: replace what an earlier run left in the output folder.
        callbacks: more callbacks of Transformers for the trainer.
        compare: measure before training, too, and let a model that writes show what it writes.

    Raises:
        RecipeError: the device, the data, the adapter or the output folder can't be used; or the run has diverged, as
            `DivergedError`, which knows the last good checkpoint.
        KeyboardInterrupt: stopped by a signal where there was nothing to save.
    """
    console = _console(console)
    problem = device_problem(recipe)
    if problem is not None:
        raise RecipeError([problem], str(recipe.source))
    output = Output(recipe)
    if is_main_process():
        output.check(resume=resume, overwrite=overwrite)
    if resume and output.finished:
        return _nothing_left(output, console)
    with Interruption() as interruption, quiet(), warnings.catch_warnings():
        # A checkpoint in the course of a run is not at its target, and need not be.
        warnings.filterwarnings("ignore", message=r"At step \d+ .*finalize_ranks")
        return _train(recipe, console, output, resume, interruption, callbacks, compare)


def _train(
    recipe: BaseRecipe,
    console: Console,
    output: Output,
    resume: bool,
    interruption: Interruption,
    more_callbacks: Sequence[Any],
    compare: bool,
) -> Result:
    # What the run is about to do. Everything that can be wrong with the recipe shows here, in seconds.
    task = load_task(recipe.task)
    with preparing(console, "reading the data"):
        data = task.read_data(recipe)
        processor = task.processor(recipe)
        planned = make_plan(recipe, data, processor, processes())
    _say(console, planned.line(), style="bold")
    console.print(planned)

    # The model with its adapters, and the trainer.
    from transformers import PrinterCallback, Trainer, set_seed

    from rankwise.recipes.best import KeepBest
    from rankwise.recipes.progress import KeepGoodCheckpoints, KeepResults, LiveProgress, StopWhenAsked

    set_seed(recipe.training.seed)
    with console.status("loading the model"):
        model = task.new_model(recipe, data, processor, weights=True)
        _say_new_weights(console, model, planned.modules_to_save)
        model, _ = attach(recipe, model, planned.total_step)
        for_task, notes = task.trainer_arguments(recipe, data, processor, model)
    for note in notes:
        _say(console, note)
    trainer_class = for_task.pop("trainer", Trainer)
    arguments = training_arguments(recipe, planned.total_step, output.folder, trainer_class)
    checkpoint = _checkpoint(output, console) if resume else None
    if checkpoint is None and is_main_process():
        output.begin()
    metrics = task.metrics(recipe)
    held_out = for_task["eval_dataset"]
    for_task["eval_dataset"] = some_examples(held_out, recipe.training.eval_examples)
    with LiveProgress(console, [(metric.key, metric.title, metric.style) for metric in metrics]) as progress:
        seen = Keep(for_task["compute_metrics"])
        for_task["compute_metrics"] = seen
        some = len(for_task["eval_dataset"])
        keep = KeepBest(recipe, metrics, output.folder, some, progress.say, lambda: seen.prediction)
        stop = StopWhenAsked(interruption, progress.say, needs_last=lambda: keep.best is not None)
        good = KeepGoodCheckpoints(progress.say)
        callbacks = [stop, progress, good, KeepResults(output), keep, *more_callbacks]
        with refusals(recipe):
            trainer = trainer_class(model=model, args=arguments, callbacks=callbacks, **for_task)
        trainer.remove_callback(PrinterCallback)

        # How good it is before, the training itself, the best adapter on disk, and how good it is then.
        before = output.results.get("before") if checkpoint else None
        samples = output.results.get("samples") or [] if checkpoint else []
        if before is None and checkpoint is None and compare:
            before = evaluate_with(trainer, metrics, held_out)
            _make_ready_to_train(trainer)
            samples = write_samples(recipe, data, processor, model)
        if checkpoint is None:
            set_seed(recipe.training.seed)  # what was measured before changes nothing of the training
        loss_before = (before or {}).get("loss")
        good.most, keep.diverged = highest_sound_loss(loss_before), partial(has_diverged, loss_before)
        started = _started(output, before, samples)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except NotFiniteError as error:  # the run was about to write a checkpoint
            raise _diverged(output, trainer, before) from error
        if good.broken:
            raise _diverged(output, trainer, before)
        steps = trainer.state.global_step
        if interruption.number is not None and steps < planned.total_step and not keep.stopped:
            return _interrupted(output, console, interruption.number, before or {}, trainer)
        best, log = keep.bring_back(model, steps), trainer.state.log_history
        trainer.accelerator.wait_for_everyone()
        # As a rule the adapter is on the disk before anything else can go wrong.
        in_doubt = looks_diverged(loss_before, log)
        if not in_doubt and is_main_process():
            _save_finite(model, processor, output, trainer, before)
        if best is not None and best.examples == len(held_out) and keep.prediction is not None:
            # Of the same adapter, on the same examples.
            after, prediction = dict(best.metrics), keep.prediction
        else:
            after, prediction = evaluate_with(trainer, metrics, held_out), seen.prediction
        if has_diverged(loss_before, after.get("loss"), log):
            raise _diverged(output, trainer, before, after)
        if in_doubt and is_main_process():
            _save_finite(model, processor, output, trainer, before)
        behind = details_of(recipe, data, processor, held_out, prediction)
        seconds = time.monotonic() - started
        if compare:
            samples = before_and_after(samples, write_samples(recipe, data, processor, model))

    trainable, _ = model.get_nb_trainable_parameters()
    kept = trainable - factor_parameters(model) + model.rank_summary().parameters
    result = Result(output.folder, None, before or {}, after, trainable, kept, samples, best)
    if is_main_process():
        _write_final_results(output, trainer, result, metrics, seconds, behind)
        facts = card_of(recipe, metrics, result.before, after, len(data.evaluation), steps, best)
        model.create_or_update_model_card(output.folder, facts)
        output.clear_best()
    _show_result(console, result, model, metrics, len(data.evaluation), seconds, steps)
    _show_next_steps(console, recipe, data, output.folder)
    return result


def some_examples(examples: Any, most: int | None) -> Any:
    """At most ``most`` of a data set's examples, spread evenly over all; None for all.

    Example:
        >>> list(some_examples(range(10), 4)), some_examples(range(3), None)
        ([0, 2, 5, 7], range(0, 3))
    """
    count = len(examples)
    if most is None or count <= most:
        return examples
    chosen = [at * count // most for at in range(most)]
    if hasattr(examples, "select"):
        return examples.select(chosen)
    from torch.utils.data import Subset

    return Subset(examples, chosen)


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write the adapter, and what using it needs: the tokenizer, and the configuration with the labels' names."""
    processor.save_pretrained(str(folder))
    model.config.save_pretrained(str(folder))
    model.save_pretrained(str(folder), training_state=False)


def _save_finite(
    model: Any, processor: Any, output: Output, trainer: Any, before: Mapping[str, float] | None
) -> None:
    try:
        save(model, processor, output.folder)
    except NotFiniteError as error:
        raise _diverged(output, trainer, before) from error


def _diverged(
    output: Output,
    trainer: Any,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None = None,
) -> DivergedError:
    """The error of a run that has diverged, which is also noted in the results."""
    log = trainer.state.log_history
    if is_main_process():
        noted = {"steps": trainer.state.global_step, "after": after or {}, "log": log, "diverged": True}
        output.write_results({**output.results, **noted, "finished": False})
    return diverged(output, (before or {}).get("loss"), (after or {}).get("loss"), log)


def evaluate_with(trainer: Any, metrics: Sequence[Metric], examples: Any) -> dict[str, float]:
    """The loss and the metrics of a trainer's model on ``examples``."""
    trainer.__dict__.pop("_eval_dataloaders", None)  # persistent workers would go on with other examples
    found = trainer.evaluate(eval_dataset=examples)
    trainer.__dict__.pop("_eval_dataloaders", None)
    keys = metric_keys(metrics)
    return {key: float(found[f"eval_{key}"]) for key in keys if f"eval_{key}" in found}


def _make_ready_to_train(trainer: Any) -> None:
    """Take back what an evaluation did to a model that has not trained yet.

    Accelerate readies a model for evaluation without connecting the processes, and takes it for ready ever after:
    under torchrun each process would go on to train for itself.
    """
    if trainer.is_fsdp_enabled:
        return  # sharding connects the processes in evaluation, too
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    trainer.model.__dict__.pop("_is_accelerate_prepared", None)


def _started(output: Output, before: Mapping[str, float] | None, samples: Sequence[Sample]) -> float:
    if is_main_process():
        output.write_results({"finished": False, "before": before, "samples": samples})
    return time.monotonic()


def _checkpoint(output: Output, console: Console) -> Path | None:
    checkpoint, broken = output.newest_checkpoint()
    for path in broken:
        _say(console, f"{path.name} was cut short while it was written, and is left out.")
    if checkpoint is None:
        _say(console, f"There is no checkpoint in {output.folder} yet: starting from the beginning.")
    else:
        _say(console, f"Going on from {checkpoint.name}.")
    return checkpoint


def _say_new_weights(console: Console, model: Any, modules_to_save: Sequence[str]) -> None:
    """Tell of weights that are random and would stay so."""
    frozen = [name for name in new_weights(model) if not set(name.split(".")) & set(modules_to_save)]
    if frozen:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in frozen)
        _say(
            console,
            f"Random and frozen: the checkpoint has no weights for {', '.join(modules)}. "
            "To train them, name them in adapter.modules_to_save.",
            style="yellow",
        )


# --- what is said in the end -------------------------------------------------------------------------------------


def _write_final_results(
    output: Output,
    trainer: Any,
    result: Result,
    metrics: Sequence[Metric],
    seconds: float,
    behind: Details | None,
) -> None:
    _, everything = trainer.model.get_nb_trainable_parameters()
    output.write_results(
        {
            "finished": True,
            "before": result.before,
            "after": result.after,
            "samples": result.samples,
            "details": behind,
            "trainable_parameters": result.trainable_parameters,
            "kept_parameters": result.kept_parameters,
            "all_parameters": everything,
            "metrics": {each.key: {"title": each.title, "style": each.style} for each in metrics},
            "steps": trainer.state.global_step,
            "total_steps": trainer.state.max_steps,
            "best": None if result.best is None else asdict(result.best),
            "seconds": round(seconds, 1),
            "ranks": trainer.model.rank_summary().to_dict(),
            "log": trainer.state.log_history,
        }
    )


def _show_result(
    console: Console,
    result: Result,
    model: Any,
    metrics: Sequence[Metric],
    held_out: int,
    seconds: float,
    steps: int,
) -> None:
    """The metrics before and after, what it took, and the ranks as a table and a picture."""
    from rankwise.report.terminal import rank_picture, rank_table

    console.print()
    console.print(_comparison(metrics, result, held_out))
    for line in sample_lines(result.samples):
        _say(console, line)
    _, everything = model.get_nb_trainable_parameters()
    share = f"{100 * result.trainable_parameters / everything:.2f} %"
    _say(
        console,
        f"\nTrained {result.trainable_parameters:,} of {everything:,} parameters ({share}) in {duration(seconds)}; "
        f"the adapter keeps {result.kept_parameters:,}.",
    )
    best = result.best
    if best is not None:
        of = "the last step" if best.step == steps else f"step {best.step:,} of {steps:,}"
        title = next((metric.title for metric in metrics if metric.key == best.metric), best.metric)
        _say(console, f"It is the adapter of {of}, the best by {title} of those with final ranks.")
    summary = model.rank_summary()
    for part in (rank_table(summary), rank_picture(summary)):
        console.print()
        console.print(part)
    _say(console, f"\nSaved to {result.folder}\n", style="bold")


def _show_next_steps(console: Console, recipe: BaseRecipe, data: TaskData, folder: Path) -> None:
    """Commands and Python lines that use the adapter."""
    place = model_place(recipe)
    base = place.name if place.path is None else str(place.path)
    quoted = shlex.quote(str(folder))
    _say(console, "What next", style="bold")
    next_commands = (f"inspect {quoted}", f"report {quoted} -o report.html", f"predict {quoted} FILE")
    _say(console, "\n".join(f"  rankwise {command}" for command in next_commands) + "\n\nIn Python:")
    lines = load_task(recipe.task).usage(recipe, data, base, str(folder)).splitlines()
    _say(console, "\n".join(f"  {line}".rstrip() for line in lines))


def _comparison(metrics: Sequence[Metric], result: Result, rows: int) -> Any:
    """A table of the metrics before and after."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), title=f"On {rows:,} held-out examples")
    table.title_justify, table.title_style = "left", "bold"
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for metric in metrics:
        sides = (result.before, result.after)
        if not any(metric.key in side for side in sides):
            continue  # it does not apply to this data
        values = [format(side[metric.key], metric.style) if metric.key in side else "-" for side in sides]
        table.add_row(metric.title, values[0], f"[bold]{values[1]}[/]")
    return table


def _interrupted(
    output: Output, console: Console, number: int, before: Mapping[str, float], trainer: Any
) -> Result:
    checkpoint, _ = output.newest_checkpoint()
    recipe = output.recipe
    program = ["rankwise"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        program = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "rankwise"]
    command = shlex.join([*program, "train", str(recipe.source), *recipe.overrides, "--resume"])
    _say(
        console, f"\nStopped after step {trainer.state.global_step:,} of {trainer.state.max_steps:,}; saved."
    )
    _say(console, f"To go on:\n\n  {command}\n")
    trainable, _ = trainer.model.get_nb_trainable_parameters()
    return Result(checkpoint or output.folder, number, before, {}, trainable, trainable)


def _nothing_left(output: Output, console: Console) -> Result:
    results = output.results
    _say(
        console,
        f"The run in {output.folder} is finished: there is nothing to resume. To train it again, use --overwrite.",
    )
    return Result(
        output.folder,
        None,
        results.get("before") or {},
        results.get("after") or {},
        int(results.get("trainable_parameters") or 0),
        int(results.get("kept_parameters") or 0),
    )


def _console(console: Console | None) -> Console:
    from rich.console import Console

    return (console or Console()) if is_main_process() else Console(quiet=True)


def _say(console: Console, text: str, style: str = "") -> None:
    """Print text as it is: no brackets taken for markup, no line broken that someone may copy."""
    with contextlib.suppress(OSError):  # the terminal may have been closed
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A duration for people.

    Example:
        >>> duration(8.24), duration(83), duration(4000)
        ('8.2 s', '1 min 23 s', '1 h 6 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
