"""The section ``training`` as Transformers' ``TrainingArguments``: allowed keys, checks, and the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import pydantic

from rankwise.attach.prepare import checkpointing_name
from rankwise.recipes.errors import Problem, did_you_mean, refusal
from rankwise.recipes.recipe import BaseRecipe, TrainingSection

if TYPE_CHECKING:
    import torch

    from rankwise.recipes.tasks import Metric

_HUB = "an adapter is shared when it is done: `push_to_hub` in docs/sharing.md."
_COMMAND = "`rankwise train` evaluates and trains by itself."

# Arguments of Transformers that a recipe can't set, and what to do instead.
NOT_TAKEN: Mapping[str, str] = {
    "output_dir": "the folder is the recipe's `output`.",
    "resume_from_checkpoint": "use --resume on the command line.",
    "do_train": _COMMAND,
    "do_eval": _COMMAND,
    "do_predict": "use `rankwise predict`.",
    "disable_tqdm": "rankwise shows its own progress.",
    "local_rank": "torchrun sets it.",
    "predict_with_generate": "the task sets it.",
    "save_only_model": "resuming needs whole checkpoints.",
    "batch_eval_metrics": "metrics are of all held-out examples together.",
    "eval_do_concat_batches": "metrics are of all held-out examples together.",
    "enable_jit_checkpoint": "rankwise saves a checkpoint when a signal stops the run.",
    "label_names": "the task names the labels.",
    "prediction_loss_only": "metrics need the predictions.",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "the model is evaluated before training, too, and would then train in half precision. Use `bf16` or `fp16`.",
    ),
    "parallelism_config": "a recipe can't hold such an object: train from Python.",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_strategy",
            "hub_token",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        _HUB,
    ),
}
# Keys of the section that only rankwise has, or that it passes on in another form.
_OWN = (
    *("num_train_epochs", "gradient_checkpointing", "eval_examples", "early_stopping_patience"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
# Arguments that only the training machine can check, or that change the process as soon as they are set.
_OF_THE_MACHINE = ("tf32", "deepspeed", "fsdp", "fsdp_config", "use_liger_kernel")


@functools.cache
def argument_types() -> Mapping[str, Any]:
    """The arguments of the installed Transformers that a recipe may set, with their types."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    fields = (field.name for field in dataclasses.fields(TrainingArguments) if field.init)
    return {name: hints[name] for name in fields if name not in NOT_TAKEN}


def training_problems(section: Any) -> Iterator[Problem]:
    """The problems with names and types of the arguments that are passed on to Transformers.

    Args:
        section: the section's data, which may be unchecked.
    """
    if not isinstance(section, dict):
        return  # reported as a wrong type
    own = TrainingSection.model_fields
    for name, value in section.items():
        where = f"training.{name}"
        if name in own or name == "activation_checkpointing":
            continue
        if name in NOT_TAKEN:
            yield Problem(where, f"is not for a recipe: {NOT_TAKEN[name]}")
        elif name not in argument_types():
            yield Problem(where, f"unknown key. {_hint(str(name), [*own, *argument_types()])}")
        else:
            value = "no" if value is False and name.endswith("_strategy") else value
            try:
                pydantic.TypeAdapter(
                    argument_types()[name],
                    config=pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True),
                ).validate_python(value)
            except pydantic.ValidationError:
                kind = getattr(argument_types()[name], "__name__", None) or str(argument_types()[name])
                yield Problem(where, f"must be of the type {kind.replace('typing.', '')}, but is {value!r}.")
                continue
            rule = _broken_rule(name, value)
            if rule is not None:
                yield Problem(where, f"{rule}, but is {value!r}.")


_SAMPLING = ("random", "sequential", "group_by_length", "batch_rebalance")


def _broken_rule(name: str, value: Any) -> str | None:
    """The rule that a value of the right type breaks, and that Transformers does not check before training."""
    if name.endswith("_kwargs") and value and not isinstance(value, dict):
        return "must be a section of `key: value` lines"
    if name == "optim_args" and value and any(part.count("=") != 1 for part in value.split(",")):
        return "must be text such as `alpha=1,beta=2`"
    if name == "label_smoothing_factor" and not 0 <= value < 1:
        return "must be at least 0 and less than 1"
    if name == "train_sampling_strategy" and value not in _SAMPLING:
        return f"must be one of {', '.join(_SAMPLING)}"
    return None


def _schedule_problem(training: TrainingSection) -> Problem | None:
    """The problem with the learning rate's schedule and its arguments, which Transformers checks late."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float32, requires_grad=True)], lr=1e-3)
    kwargs = training.others.get("lr_scheduler_kwargs") or {}
    kind = training.lr_scheduler_type
    try:
        get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=dict(kwargs))
    except (TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        return Problem("training.lr_scheduler_kwargs", f"do not fit lr_scheduler_type: {kind} ({said}).")
    return None


_SYNONYMS = {
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "optimizer": "optim",
    "patience": "early_stopping_patience",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
}


def _hint(name: str, valid: Sequence[str]) -> str:
    meant = _SYNONYMS.get(name)
    return f"Did you mean {meant!r}?" if meant else did_you_mean(name, valid)


def metric_keys(metrics: Sequence[Metric]) -> list[str]:
    """The keys of an evaluation: ``loss``, then those of the task's metrics."""
    return list(dict.fromkeys(["loss", *(metric.key for metric in metrics)]))


def run_problems(recipe: BaseRecipe, metrics: Sequence[Metric]) -> Iterator[Problem]:
    """The problems with the section's values: in combination, with the task, or for Transformers.

    Args:
        recipe: a recipe in which `training_problems` found no problem.
        metrics: the metrics of the recipe's task.
    """
    training = recipe.training
    keys = metric_keys(metrics)
    if training.metric_for_best_model not in keys:
        hint = did_you_mean(training.metric_for_best_model, keys)
        where = "training.metric_for_best_model"
        yield Problem(where, f"{recipe.task} has no metric {training.metric_for_best_model!r}. {hint}")
    if training.eval_steps is not None and training.evaluates != "steps":
        yield Problem(
            "training.eval_steps", f"has no effect with eval_strategy: {training.evaluates}. Take one out."
        )
    if training.early_stopping_patience is not None:
        for missing, name in ((training.evaluates == "no", "eval_strategy: no"),
                              (not training.load_best_model_at_end, "load_best_model_at_end: false")):  # fmt: skip
            if missing:
                yield Problem("training.early_stopping_patience", f"has no effect with {name}. Take one out.")
    if recipe.device != "cpu" and recipe.device != "auto" and training.use_cpu:
        yield Problem("device", f"is {recipe.device!r}, but training.use_cpu is true. Take one out.")
    defaults = TrainingSection()
    if not training.others and (training.optim, training.lr_scheduler_type) == (
        defaults.optim,
        defaults.lr_scheduler_type,
    ):
        return  # Transformers has nothing left to check, and importing it takes seconds
    from transformers import TrainingArguments
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    kinds: tuple[tuple[str, str, Any], ...] = (
        ("lr_scheduler_type", training.lr_scheduler_type, SchedulerType),
        ("optim", training.optim, OptimizerNames),
    )
    wrong = False
    for name, value, kind in kinds:
        valid = [each.value for each in kind]
        if value not in valid:
            wrong = True
            yield Problem(f"training.{name}", f"Transformers has no {value!r}. {did_you_mean(value, valid)}")
    if wrong:
        return
    problem = _schedule_problem(training)
    if problem is not None:
        yield problem
    if training.others.get("dataloader_persistent_workers") and training.dataloader_num_workers == 0:
        yield Problem(
            "training.dataloader_persistent_workers",
            "needs dataloader_num_workers of 1 or more, and it is 0.",
        )
    fields = argument_fields(recipe, 1, Path(tempfile.gettempdir()), TrainingArguments)
    fields |= {"report_to": "none"}  # the tracker may not be installed here
    try:
        TrainingArguments(**{name: value for name, value in fields.items() if name not in _OF_THE_MACHINE})
    except (ValueError, ImportError, TypeError) as error:
        named = next(
            (
                name
                for name, value in training.others.items()
                if name in str(error) or (isinstance(value, str) and value in str(error))
            ),
            None,
        )
        yield Problem(f"training.{named}" if named else "training", " ".join(str(error).split()))


def argument_fields(
    recipe: BaseRecipe, total_step: int, folder: Path, arguments_class: Any
) -> dict[str, Any]:
    """The arguments of a recipe's run, by their names in Transformers.

    Args:
        recipe: the run's recipe.
        total_step: the number of optimizer steps of the run.
        folder: the folder for checkpoints.
        arguments_class: ``TrainingArguments`` or a subclass, which tells its name for gradient checkpointing.
    """
    import torch

    training = recipe.training
    fields = {name: value for name, value in training.model_dump().items() if name not in _OWN}
    kwargs: dict[str, Any] = {}
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        kwargs |= fields.pop(name, None) or {}
    if training.gradient_checkpointing:
        name = checkpointing_name(arguments_class)
        fields |= {name: True, f"{name}_kwargs": {"use_reentrant": False, **kwargs}}
    share = fields["warmup_steps"]
    if training.saves == "best":
        fields |= {"metric_for_best_model": training.metric_for_best_model,
                   "greater_is_better": training.greater_is_better}  # fmt: skip
    if fields.get("logging_strategy") is False:
        fields["logging_strategy"] = "no"
    return {
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **fields,
        "output_dir": str(folder),
        "max_steps": total_step,
        "warmup_steps": round(share * total_step) if isinstance(share, float) and share < 1 else int(share),
        "eval_strategy": training.evaluates,
        "save_strategy": training.saves,
        "save_steps": fields["save_steps"] or 500,
        "disable_tqdm": True,
        # Without this, each process that torchrun starts on CPUs would train alone.
        "use_cpu": device_of(recipe).type == "cpu",
    }


def training_arguments(recipe: BaseRecipe, total_step: int, folder: Path, trainer_class: Any) -> Any:
    """Transformers' arguments for a recipe and a trainer's class. A ``Seq2SeqTrainer`` generates in evaluations.

    Raises:
        RecipeError: Transformers refuses the arguments.
    """
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

    arguments_class = TrainingArguments
    more = {}
    if issubclass(trainer_class, Seq2SeqTrainer):
        arguments_class = Seq2SeqTrainingArguments
        more["predict_with_generate"] = True
    with refusals(recipe):
        arguments = arguments_class(**argument_fields(recipe, total_step, folder, arguments_class), **more)
    if processes() == 1 and arguments.n_gpu > 1:
        # Several GPUs are for torchrun. nn.DataParallel would copy the adapters at every step.
        arguments._n_gpu = 1
    return arguments


@contextlib.contextmanager
def refusals(recipe: BaseRecipe) -> Iterator[None]:
    """Turn Transformers' errors about the section ``training``, such as a missing package, into a `RecipeError`."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise refusal("training", str(error), str(recipe.source)) from error


def is_main_process() -> bool:
    """Whether this is the main process, which alone prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


# --- the device --------------------------------------------------------------------------------------------------


def device_of(recipe: BaseRecipe) -> torch.device:
    """The device to train on: the GPU if there is one and the recipe does not say ``cpu``."""
    import torch

    if recipe.device == "cpu" or recipe.training.use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def device_problem(recipe: BaseRecipe) -> Problem | None:
    """The reason why the recipe can't train on this machine, or None if it can."""
    import torch

    device = device_of(recipe)
    if recipe.device not in ("auto", device.type):
        what = "no GPU" if device.type == "cpu" else f"only {device.type}"
        return Problem(
            "device", f"is {recipe.device!r}, but PyTorch {torch.__version__} sees {what} here. Set it to auto, or "
            "install the build of PyTorch for this machine."
        )  # fmt: skip
    if recipe.training.fp16 and device.type == "cpu":
        return Problem(
            "training.fp16",
            "needs a GPU, and here the CPU trains. Set bf16: true instead, or take the line out.",
        )
    return None


def device_line(recipe: BaseRecipe) -> str:
    """The device and the precision with which the recipe trains on this machine, as text.

    Example:
        >>> from types import SimpleNamespace
        >>> training = SimpleNamespace(use_cpu=True, bf16=True, fp16=False)
        >>> line = device_line(SimpleNamespace(device="cpu", dtype="float32", training=training))
        >>> line.startswith("CPU"), line.endswith("mixed precision in bfloat16 over weights in float32")
        (True, True)
    """
    import torch

    device, training = device_of(recipe), recipe.training
    if device.type == "cpu":
        count = torch.get_num_threads()
        place = f"CPU ({count} thread{'' if count == 1 else 's'})"
    elif device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        place = f"GPU {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    else:
        place = f"GPU ({device.type})"
    several = f"{processes()} processes, each on one: {place}" if processes() > 1 else place
    mixed = "bfloat16" if training.bf16 else "float16" if training.fp16 else None
    weights = "the dtype of the model's file" if recipe.dtype == "auto" else recipe.dtype
    return f"{several}, " + (f"mixed precision in {mixed} over weights in {weights}" if mixed else weights)
