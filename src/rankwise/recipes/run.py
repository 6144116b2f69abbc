"""Training a recipe, from top to bottom: check, read the data, plan, load, adapt, evaluate, train, save, report."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.files.explain import errno_of
from rankwise.recipes.card import card_of
from rankwise.recipes.console import lasting_console
from rankwise.recipes.data.identity import facts_of, what_changed
from rankwise.recipes.data.splits import some_examples
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
    """The result of a run.

    Args:
        folder: the folder of the adapter. If the run was interrupted, the folder of the checkpoint to resume from.
        interrupted: the number of the signal that stopped the run early, or None.
        before: the values of the metrics before training, by key.
        after: the values of the metrics after training, by key. Empty if the run was interrupted.
        trainable_parameters: the number of parameters that trained.
        kept_parameters: the number of these parameters that the adapter keeps after pruning.
        samples: texts that the model wrote before and after, for tasks in which it writes.
        best: the evaluation of the adapter that was kept. None: the adapter of the last step was kept.
        late_signal: the number of a signal that came in the last step, so that the run was finished, or None.

    Example:
        >>> result = Result(Path("output/reviews"), None, {"loss": 0.7}, {"loss": 0.4}, 100_000, 60_000)
        >>> result.after["loss"] < result.before["loss"]
        True
    """

    folder: Path
    interrupted: int | None
    before: Mapping[str, float]
    after: Mapping[str, float]
    trainable_parameters: int
    kept_parameters: int
    samples: Sequence[Sample] = ()
    best: Best | None = None
    late_signal: int | None = None


def plan(recipe: BaseRecipe) -> Plan:
    """Read a recipe's data and plan its run, without loading weights.

    Args:
        recipe: the recipe that `load_recipe` returned.

    Returns:
        The plan: phases, budget, ranks, parameters and memory.

    Raises:
        RecipeError: the data, the schedule or the adapter can't be used.

    Example:
        >>> from rankwise.recipes import load_recipe
        >>> found = plan(load_recipe("recipes/quickstart.yaml"))
        >>> found.layers, found.total_step, found.initial, found.target
        (36, 114, 288, 144)
    """
    from rich.console import Console

    task = load_task(recipe.task)
    # Progress goes to the standard error, because the plan on the standard output may go into a file.
    with preparing(Console(stderr=True), "reading the data"), quiet():
        data = task.read_data(recipe)
        return make_plan(recipe, data, task.processor(recipe), processes(), memory=True)


def plan_memory(recipe: BaseRecipe) -> Memory:
    """Estimate the memory that a recipe's run takes, from the model's configuration, without data and weights.

    Args:
        recipe: the recipe that `load_recipe` returned.

    Returns:
        The estimate, in bytes.

    Raises:
        RecipeError: the adapter can't be used.

    Example:
        >>> from rankwise.recipes import load_recipe
        >>> memory = plan_memory(load_recipe("recipes/quickstart.yaml"))
        >>> memory.adapters, memory.optimizer
        (1327104, 2660368)
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
    """Train a recipe, and save the adapter to the recipe's output folder.

    Args:
        recipe: the recipe that `load_recipe` returned.
        console: the console that shows the run. None: the standard output. Only the main process shows anything.
        resume: whether to resume from the newest complete checkpoint in the output folder. If there is none, the run
            starts from the beginning.
        overwrite: whether to replace an earlier run in the output folder.
        callbacks: callbacks of Transformers to add to the trainer.
        compare: whether to measure before training, too, and to let models that write show samples.

    Returns:
        The result: the adapter's folder, and the metrics before and after.

    Raises:
        DivergedError: the run has diverged. The error names the last good checkpoint. It is a `RecipeError`.
        RecipeError: the device, the data, the adapter or the output folder can't be used.
        KeyboardInterrupt: a signal stopped the process while there was nothing to save.

    Example:
        >>> import tempfile
        >>> from rich.console import Console
        >>> from rankwise.recipes import load_recipe
        >>> small = ["data.train_size=32", "data.held_out=16", "training.max_steps=2", f"output={tempfile.mkdtemp()}"]
        >>> recipe = load_recipe("recipes/quickstart.yaml", small)
        >>> result = train(recipe, console=Console(quiet=True))
        >>> result.kept_parameters < result.trainable_parameters, sorted(result.after)
        (True, ['accuracy', 'loss', 'macro_f1'])
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
    with Interruption() as interruption, quiet(), warnings.catch_warnings(), contextlib.ExitStack() as at_end:
        # Checkpoints during a run need not be at the target, so the warning about that is silenced.
        warnings.filterwarnings("ignore", message=r"At step \d+ .*finalize_ranks")

        def claim() -> None:
            if is_main_process():
                at_end.enter_context(output.claimed(resume=resume, overwrite=overwrite))

        return _train(recipe, console, output, claim, resume, interruption, callbacks, compare)


def _train(
    recipe: BaseRecipe,
    console: Console,
    output: Output,
    claim: Callable[[], None],
    resume: bool,
    interruption: Interruption,
    more_callbacks: Sequence[Any],
    compare: bool,
) -> Result:
    # The plan. Everything that can be wrong with the recipe shows here, within seconds.
    task = load_task(recipe.task)
    with preparing(console, "reading the data"):
        data = task.read_data(recipe)
        processor = task.processor(recipe)
        planned = make_plan(recipe, data, processor, processes())
    _say(console, planned.line(), style="bold")
    console.print(planned)

    # The model with its adapters, and the trainer.
    from transformers import PrinterCallback, set_seed

    from rankwise.recipes.best import KeepBest
    from rankwise.recipes.progress import KeepGoodCheckpoints, KeepResults, LiveProgress, StopWhenAsked
    from rankwise.recipes.trainer import RecipeTrainer

    set_seed(recipe.training.seed)
    with console.status("loading the model"):
        model = task.new_model(recipe, data, processor, weights=True)
        _say_new_weights(console, model, planned.modules_to_save)
        model, _ = attach(recipe, model, planned.total_step)
        for_task, notes = task.trainer_arguments(recipe, data, processor, model)
    for note in notes:
        _say(console, note)
    trainer_class = for_task.pop("trainer", RecipeTrainer)
    arguments = training_arguments(recipe, planned.total_step, output.folder, trainer_class)
    claim()
    checkpoint = _checkpoint(output, console) if resume else None
    examples = facts_of(data.train, data.evaluation, data.labels)
    if checkpoint is not None:
        _refuse_other_data(output, examples)
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

        # Evaluate before training, train, save the best adapter, and evaluate again.
        before = output.results.get("before") if checkpoint else None
        samples = output.results.get("samples") or [] if checkpoint else []
        if before is None and checkpoint is None and compare:
            before = evaluate_with(trainer, metrics, held_out)
            _make_ready_to_train(trainer)
            samples = write_samples(recipe, data, processor, model)
        if checkpoint is None:
            # The evaluation before training must not change the training.
            set_seed(recipe.training.seed)
        loss_before = (before or {}).get("loss")
        good.most, keep.diverged = highest_sound_loss(loss_before), partial(has_diverged, loss_before)
        started = _started(output, before, samples, examples)
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
        # Save the adapter before anything else can go wrong, unless the run may have diverged.
        in_doubt = looks_diverged(loss_before, log)
        if not in_doubt and is_main_process():
            _save_finite(model, processor, output, trainer, before, console)
        if best is not None and best.examples == len(held_out) and keep.prediction is not None:
            # The best evaluation already measured this adapter on all held-out examples.
            after, prediction = dict(best.metrics), keep.prediction
        else:
            after, prediction = evaluate_with(trainer, metrics, held_out), seen.prediction
        if has_diverged(loss_before, after.get("loss"), log):
            raise _diverged(output, trainer, before, after)
        if in_doubt and is_main_process():
            _save_finite(model, processor, output, trainer, before, console)
        behind = details_of(recipe, data, processor, held_out, prediction)
        seconds = time.monotonic() - started
        if compare:
            samples = before_and_after(samples, write_samples(recipe, data, processor, model))

    trainable, _ = model.get_nb_trainable_parameters()
    kept = trainable - factor_parameters(model) + model.rank_summary().parameters
    late = interruption.number
    result = Result(output.folder, None, before or {}, after, trainable, kept, samples, best, late)
    if is_main_process():
        _write_final_results(output, trainer, result, metrics, seconds, behind, examples)
        facts = card_of(recipe, metrics, result.before, after, len(data.evaluation), steps, best)
        model.create_or_update_model_card(output.folder, facts)
        output.clear_best()
    _show_result(console, result, model, metrics, len(data.evaluation), seconds, steps)
    _show_next_steps(console, recipe, data, output.folder)
    return result


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write the adapter, the tokenizer, and the model's configuration with the labels' names."""
    processor.save_pretrained(str(folder))
    model.config.save_pretrained(str(folder))
    model.save_pretrained(str(folder), training_state=False)


def _save_finite(
    model: Any,
    processor: Any,
    output: Output,
    trainer: Any,
    before: Mapping[str, float] | None,
    console: Console,
) -> None:
    try:
        save(model, processor, output.folder)
    except NotFiniteError as error:
        raise _diverged(output, trainer, before) from error
    except Exception as error:
        if errno_of(error) is not None:  # the output folder can't be written, but another place may be
            place = tempfile.mkdtemp(prefix="rankwise-adapter-")
            model.save_pretrained(place, training_state=False)
            _say(console, f"{output.folder} can't be written, so the trained adapter was saved in {place}.")
        raise


def _diverged(
    output: Output,
    trainer: Any,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None = None,
) -> DivergedError:
    """Note in the results that the run has diverged, and return the error to raise."""
    log = trainer.state.log_history
    if is_main_process():
        noted = {"steps": trainer.state.global_step, "after": after or {}, "log": log, "diverged": True}
        output.write_results({**output.results, **noted, "finished": False})
    return diverged(output, (before or {}).get("loss"), (after or {}).get("loss"), log)


def evaluate_with(trainer: Any, metrics: Sequence[Metric], examples: Any) -> dict[str, float]:
    """The loss and the metrics of a trainer's model on ``examples``."""
    trainer.__dict__.pop("_eval_dataloaders", None)  # persistent workers would reuse other examples
    found = trainer.evaluate(eval_dataset=examples)
    trainer.__dict__.pop("_eval_dataloaders", None)
    keys = metric_keys(metrics)
    return {key: float(found[f"eval_{key}"]) for key in keys if f"eval_{key}" in found}


def _make_ready_to_train(trainer: Any) -> None:
    """Undo what an evaluation before training did to the model.

    For evaluation, Accelerate prepares a model without connecting the processes. It would treat this model as prepared
    for training, too, and under torchrun each process would train alone.
    """
    if trainer.is_fsdp_enabled:
        return  # sharding connects the processes in evaluation, too
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    trainer.model.__dict__.pop("_is_accelerate_prepared", None)


def _started(
    output: Output, before: Mapping[str, float] | None, samples: Sequence[Sample], facts: Mapping[str, Any]
) -> float:
    if is_main_process():
        output.write_results({"finished": False, "data": facts, "before": before, "samples": samples})
    return time.monotonic()


def _refuse_other_data(output: Output, facts: Mapping[str, Any]) -> None:
    """Refuse to resume on changed data, where rows that were trained on may be held out now."""
    changed = what_changed(output.results.get("data"), facts)
    if changed is not None:
        raise RecipeError(
            f"The data of the run in {str(output.folder)!r} has changed: {changed}. A resumed run would be measured on "
            "examples that it was trained on. Restore the data, or train again with --overwrite or another `output`."
        )


def _checkpoint(output: Output, console: Console) -> Path | None:
    checkpoint, broken = output.newest_checkpoint()
    for path in broken:
        _say(console, f"{path.name} was cut short while it was written, and is left out.")
    if checkpoint is None:
        _say(console, f"There is no checkpoint in {output.folder} yet: starting from the beginning.")
    else:
        _say(console, f"Continuing from {checkpoint.name}.")
    return checkpoint


def _say_new_weights(console: Console, model: Any, modules_to_save: Sequence[str]) -> None:
    """Warn about weights that are random and do not train."""
    frozen = [name for name in new_weights(model) if not set(name.split(".")) & set(modules_to_save)]
    if frozen:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in frozen)
        _say(
            console,
            f"Random and frozen: the checkpoint has no weights for {', '.join(modules)}. "
            "To train them, name them in adapter.modules_to_save.",
            style="yellow",
        )


# --- the results -------------------------------------------------------------------------------------------------


def _write_final_results(
    output: Output,
    trainer: Any,
    result: Result,
    metrics: Sequence[Metric],
    seconds: float,
    behind: Details | None,
    facts: Mapping[str, Any],
) -> None:
    _, everything = trainer.model.get_nb_trainable_parameters()
    output.write_results(
        {
            "finished": True,
            "data": facts,
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
    """Print the metrics before and after, parameters and time, and the ranks as a table and a picture."""
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
        _say(
            console,
            f"It is the adapter of {of}, which has the best {title} of all evaluations with final ranks.",
        )
    summary = model.rank_summary()
    for part in (rank_table(summary), rank_picture(summary)):
        console.print()
        console.print(part)
    _say(console, f"\nSaved to {result.folder}\n", style="bold")


def _show_next_steps(console: Console, recipe: BaseRecipe, data: TaskData, folder: Path) -> None:
    """Print commands and Python lines that use the adapter."""
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
            continue  # the metric does not apply to this data
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
    _say(console, f"To continue:\n\n  {command}\n")
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

    return (console or lasting_console()) if is_main_process() else Console(quiet=True)


def _say(console: Console, text: str, style: str = "") -> None:
    """Print text as it is: without markup, and without breaking lines that users may copy."""
    with contextlib.suppress(OSError):  # the terminal may have been closed
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A duration as text.

    Example:
        >>> duration(8.24), duration(83), duration(4000)
        ('8.2 s', '1 min 23 s', '1 h 6 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
