"""The plan of a run: sizes, phases, budget and parameters, without loading any weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.attach.attachment import adapter_layers
from rankwise.attach.rank_plan import RankPlan
from rankwise.method.schedule import BudgetSchedule
from rankwise.recipes.errors import refusal
from rankwise.recipes.memory.estimate import Memory, estimate_memory
from rankwise.recipes.models import head_modules
from rankwise.recipes.places import find_place
from rankwise.recipes.recipe import BaseRecipe, TrainingSection, config_class
from rankwise.recipes.tasks import NO_DATA, TaskData, load_task
from rankwise.recipes.training import device_line, device_problem

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Plan:
    """The plan of a run. ``rich`` prints it as a readable page.

    Args:
        recipe: the run's recipe.
        architecture: the name of the model's class.
        train_rows: the number of training examples.
        held_out_rows: the number of held-out examples.
        labels: the names of the labels. None: the task has none.
        total_step: the number of optimizer steps.
        schedule: the phases of AdaLoRA. None: the method is LoRA.
        layers: the number of adapted layers.
        initial: the sum of all ranks at the start.
        target: the sum of all ranks at the end.
        all_parameters: the number of parameters of the model with its adapters.
        trainable_at_start: the number of trainable parameters at the start.
        trainable_at_end: the number of trainable parameters at the end, if every layer ends at the average rank.
        modules_to_save: the names of the modules that train in full.
        processes: the number of training processes.
        device: the device and the precision of training, as text.
        notes: notes for the user about the data, one sentence each.
        memory: the estimate of the memory that training takes. None: it was not asked for.
    """

    recipe: BaseRecipe
    architecture: str
    train_rows: int
    held_out_rows: int
    labels: tuple[str, ...] | None
    total_step: int
    schedule: BudgetSchedule | None
    layers: int
    initial: int
    target: int
    all_parameters: int
    trainable_at_start: int
    trainable_at_end: int
    modules_to_save: tuple[str, ...]
    processes: int
    device: str
    notes: tuple[str, ...] = ()
    memory: Memory | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as data for JSON."""
        schedule = self.schedule
        return {
            "model": self.recipe.model,
            "architecture": self.architecture,
            "task": self.recipe.task,
            "method": self.recipe.method,
            "device": self.device,
            "data": {
                "train": self.train_rows,
                "held_out": self.held_out_rows,
                "labels": None if self.labels is None else list(self.labels),
                "notes": list(self.notes),
            },
            "schedule": schedule
            and {
                "tinit": schedule.tinit,
                "tfinal": schedule.tfinal,
                "deltaT": schedule.deltaT,
                "phases": {str(phase): list(steps) for phase, steps in schedule.phases().items()},
            },
            "total_step": self.total_step,
            "layers": self.layers,
            "budget": {"initial": self.initial, "target": self.target},
            "parameters": {
                "all": self.all_parameters,
                "trainable_at_start": self.trainable_at_start,
                "trainable_at_end": self.trainable_at_end,
            },
            "modules_to_save": list(self.modules_to_save),
            "memory": None if self.memory is None else self.memory.to_dict(),
            "output": self.recipe.output,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._lines():
            table.add_row(name, Text(value))
        yield table
        if self.schedule is not None:
            from rankwise.report.terminal import budget_chart

            yield Text(
                "\nbudget: the sum of all layers' ranks, counted in ranks of average size", style="bold"
            )
            yield budget_chart(self.schedule, self.initial, self.target)
        if self.memory is not None:
            yield Text("")
            yield self.memory

    def _lines(self) -> Iterator[tuple[str, str]]:
        recipe, training = self.recipe, self.recipe.training
        yield (
            "model",
            f"{recipe.model}: {self.architecture}, {self.all_parameters:,} parameters with the adapters",
        )
        yield "data", f"{self.train_rows:,} examples to train on, {self.held_out_rows:,} held out"
        if self.labels is not None:
            shown = ", ".join(self.labels[:10]) + (", …" if len(self.labels) > 10 else "")
            yield "labels", f"{len(self.labels)}: {shown}"
        for note in self.notes:
            yield "", note
        problem = device_problem(recipe)
        if problem is not None:
            yield "", f"{problem} `rankwise train` would refuse it here."
        yield "adapter", self._adapter_line()
        yield "device", self.device
        yield (
            "training",
            (
                f"{self.total_step:,} steps of {self.batch} examples ({self.epochs}), "
                f"learning rate {recipe.training.learning_rate:g}, {training.lr_scheduler_type}"
            ),
        )
        yield "trainable", self._trainable_line()
        yield "output", recipe.output

    @property
    def batch(self) -> int:
        """The number of examples in an optimizer step, over all processes."""
        own = self.recipe.training
        return own.per_device_train_batch_size * own.gradient_accumulation_steps * self.processes

    @property
    def epochs(self) -> str:
        """The number of passes over the training data, as text."""
        share = self.total_step / steps_in_an_epoch(self.recipe.training, self.train_rows, self.processes)
        number = f"{share:,.2f}".rstrip("0").rstrip(".")
        return f"{number} epoch{'' if number == '1' else 's'}"

    def line(self) -> str:
        """The device, the precision, the number of examples and the length of the run, in one line."""
        return (
            f"Training on {self.device}: {self.train_rows:,} examples, {self.total_step:,} steps of {self.batch}, "
            f"{self.epochs}."
        )

    def _adapter_line(self) -> str:
        name = {"adalora": "AdaLoRA", "lora": "LoRA"}[self.recipe.method]
        before, after = round(self.initial / self.layers, 1), round(self.target / self.layers, 1)
        ranks = (
            f"rank {before:g}{'' if before.is_integer() else ' on average'}"
            if self.schedule is None
            else f"rank {before:g} in each layer at the start, {after:g} on average at the end"
        )
        whole = f"; trained in full: {', '.join(self.modules_to_save)}" if self.modules_to_save else ""
        return f"{name} on {self.layers} layers, {ranks}{whole}"

    def _trainable_line(self) -> str:
        def share(count: int) -> str:
            return f"{count:,} ({100 * count / self.all_parameters:.2f} %)"

        if self.schedule is None:
            return f"{share(self.trainable_at_start)} parameters"
        end = share(self.trainable_at_end)
        return f"{share(self.trainable_at_start)} parameters at the start, about {end} at the end"


def make_plan(
    recipe: BaseRecipe, data: TaskData, processor: Any, processes: int = 1, *, memory: bool = False
) -> Plan:
    """Plan a run on data that was read, with a model without weights.

    Args:
        recipe: the run's recipe.
        data: the data that the task read.
        processor: the task's tokenizer or feature extractor.
        processes: the number of training processes.
        memory: whether to estimate the memory, too. This takes seconds for a large model.

    Raises:
        RecipeError: no batch is complete, no evaluation comes before the end, or the schedule or the adapter does not
            fit the run or the model.
    """
    batch = recipe.training.per_device_train_batch_size * processes
    if recipe.training.others.get("dataloader_drop_last") and len(data.train) < batch:
        raise refusal(
            "training.dataloader_drop_last",
            f"drops all {len(data.train)} training examples, because a batch takes {batch}. Take it out, or make "
            "per_device_train_batch_size smaller.",
        )
    total = total_steps(recipe.training, len(data.train), processes)
    _check_delay(recipe, total, steps_in_an_epoch(recipe.training, len(data.train), processes))
    if recipe.method == "adalora":
        recipe.schedule.resolve(total)  # refuses phases that do not fit, before anything is loaded
    model = load_task(recipe.task).new_model(recipe, data, processor, weights=False)
    architecture = type(model).__name__
    model, config = attach(recipe, model, total)
    schedule = config.resolved_schedule() if recipe.method == "adalora" else None
    layers = adapter_layers(model)
    initial = sum(layer.lora_A["default"].shape[0] for layer in layers.values())
    trainable, everything = model.get_nb_trainable_parameters()
    target, at_end = initial, trainable
    if schedule is not None:
        target = round(config.target_r * sum(layer.blocks(layer) for layer in layers.values()))
        at_end -= round(factor_parameters(model) * (1 - target / initial))
    return Plan(
        recipe=recipe,
        architecture=architecture,
        train_rows=len(data.train),
        held_out_rows=len(data.evaluation),
        labels=None if data.labels is None else tuple(data.labels),
        total_step=total,
        schedule=schedule,
        layers=len(layers),
        initial=initial,
        target=target,
        all_parameters=everything,
        trainable_at_start=trainable,
        trainable_at_end=at_end,
        modules_to_save=tuple(config.modules_to_save or ()),
        processes=processes,
        device=device_line(recipe),
        notes=tuple(data.notes),
        memory=_memory(recipe, model, processes) if memory else None,
    )


def _check_delay(recipe: BaseRecipe, total: int, epoch: int) -> None:
    """Refuse a delay of the first evaluation beyond the run's end: no adapter would be the best, and none stop it."""
    training = recipe.training
    delay, unit = training.others.get("eval_delay") or 0, "steps"
    length: float = total
    if training.evaluates == "epoch":
        length, unit = round(total / epoch, 2), "epochs"
    if training.evaluates != "no" and delay > length:
        raise refusal(
            "training.eval_delay",
            f"is {delay:g} {unit}, but the run has {length:g}, so nothing would be evaluated during training. Make it "
            "smaller, or set eval_strategy: no.",
            str(recipe.source),
        )


def memory_plan(recipe: BaseRecipe, processes: int = 1) -> Memory:
    """Estimate the memory that a run takes, from the model's configuration alone.

    Data, tokenizer and weights are not needed.

    Args:
        recipe: the run's recipe.
        processes: the number of training processes.

    Raises:
        RecipeError: the adapter does not fit the model.
    """
    model = load_task(recipe.task).new_model(recipe, NO_DATA, None, weights=False)
    model, _ = attach(recipe, model, recipe.training.max_steps or _LONG_RUN)
    return _memory(recipe, model, processes)


_LONG_RUN = 10**9  # a number of steps for estimates that do not depend on it


def _memory(recipe: BaseRecipe, model: Any, processes: int) -> Memory:
    """Estimate the memory for an adapted model without weights. The model can't be used afterwards."""
    largest_batch, training = load_task(recipe.task).largest_batch, recipe.training
    size = {"per_device_train_batch_size": training.per_device_eval_batch_size}
    evaluating = recipe.model_copy(update={"training": training.model_copy(update=size)})
    return estimate_memory(
        model,
        largest_batch(recipe, model.config),
        training,
        processes,
        evaluation_batch=largest_batch(evaluating, model.config),
    )


def factor_parameters(model: Any) -> int:
    """The number of trainable parameters in A, B and E of all layers, including those of pruned ranks."""
    factor = re.compile(r"\.lora_[ABE]\.default$")
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return sum(parameter.numel() for name, parameter in trained if factor.search(name))


def total_steps(training: TrainingSection, rows: int, processes: int = 1) -> int:
    """The number of optimizer steps of a run.

    Args:
        training: the recipe's section ``training``.
        rows: the number of training examples.
        processes: the number of training processes, each with its own batches.

    Example:
        >>> total_steps(TrainingSection(num_train_epochs=2, per_device_train_batch_size=8), rows=100)
        26
    """
    if training.max_steps is not None:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * steps_in_an_epoch(training, rows, processes)))


def steps_in_an_epoch(training: TrainingSection, rows: int, processes: int = 1) -> int:
    """The number of optimizer steps in one pass over ``rows`` examples. The arguments are those of `total_steps`."""
    batches = math.ceil(math.ceil(rows / training.per_device_train_batch_size) / processes)
    if training.others.get("dataloader_drop_last"):
        batches = rows // training.per_device_train_batch_size // processes
    return max(1, math.ceil(batches / training.gradient_accumulation_steps))


def attach(recipe: BaseRecipe, model: Any, total_step: int) -> tuple[Any, Any]:
    """Adapt a model as a recipe says.

    Args:
        recipe: the run's recipe.
        model: the base model of the recipe's task.
        total_step: the number of optimizer steps of the run.

    Returns:
        The adapted model, and the configuration of its adapter.

    Raises:
        RecipeError: the adapter does not fit the model.
    """
    import rankwise

    fields = planned_fields(recipe)
    fields["task_type"] = load_task(recipe.task).TASK_TYPE
    # A task's head is new, so it has to train. The recipe may name other modules to train in full.
    fields.setdefault("modules_to_save", head_modules(model) or None)
    if recipe.method == "adalora":
        fields |= recipe.schedule.model_dump()
        fields["total_step"] = total_step
    try:
        config = config_class(recipe.method)(**fields)
    except (TypeError, ValueError) as error:
        raise refusal("adapter", str(error), str(recipe.source)) from error
    try:
        return rankwise.get_peft_model(model, config), config
    except ValueError as error:  # a TypeError would be a fault of rankwise
        raise refusal("adapter", str(error), str(recipe.source)) from error


def planned_fields(recipe: BaseRecipe) -> dict[str, Any]:
    """The fields of the adapter section, and those of its ``plan`` if it names one. A plan also sets the layers.

    Raises:
        RecipeError: there is no such plan, or it can't be used.
    """
    fields = dict(recipe.adapter_fields)
    name = fields.pop("plan", None)
    if name is None:
        return fields
    place = find_place(name, "adapter.plan", recipe.folder)
    fields.pop("target_modules", None)  # the plan names the layers
    try:
        plan = RankPlan.load(place.path or name)
        return plan.adalora_fields(fields) if recipe.method == "adalora" else plan.lora_fields(fields)
    except (TypeError, ValueError, OSError) as error:
        raise refusal("adapter.plan", str(error), str(recipe.source)) from error
