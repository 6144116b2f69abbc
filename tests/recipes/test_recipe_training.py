"""The section `training`: every argument of Transformers' TrainingArguments, as Transformers checks it; the device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainingArguments

from rankwise.recipes import RecipeError, load_recipe, plan, train
from rankwise.recipes.recipe import TrainingSection
from rankwise.recipes.training import NOT_TAKEN, argument_types, training_arguments
from recipe_world import write_recipe


def arguments(world: Path, model: Path, *overrides: str) -> Any:
    from transformers import Trainer

    return training_arguments(load_recipe(write_recipe(world, model), overrides), 10, world / "out", Trainer)


def test_every_argument_of_transformers_is_taken_or_named_as_not_taken() -> None:
    """An argument that a newer Transformers adds works without a change here. A removed one is not offered."""
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert names == set(argument_types()) | (set(NOT_TAKEN) & names)
    assert not set(argument_types()) & set(NOT_TAKEN)


# For each kind of argument a value other than its default, which must reach Transformers.
GIVEN = {
    "eval_strategy": "steps",
    "label_smoothing_factor": 0.1,
    "use_cpu": True,
    "run_name": "mine",
    "torch_compile": True,
    "adam_beta2": 0.98,
    "lr_scheduler_type": "cosine",
    "optim": "adafactor",
    "optim_args": "scale_parameter=False",
    "logging_first_step": True,
    "neftune_noise_alpha": 5.0,
    "dataloader_drop_last": True,
    "data_seed": 3,
    "ddp_find_unused_parameters": False,
    "save_strategy": "no",
    "eval_delay": 2,
    "logging_strategy": "epoch",
    "eval_steps": 0.25,
    "max_grad_norm": 0.5,
}


@pytest.mark.parametrize(("name", "value"), GIVEN.items(), ids=GIVEN)
def test_the_recipes_arguments_reach_transformers(
    world: Path, tiny_model: Path, name: str, value: Any
) -> None:
    found = getattr(arguments(world, tiny_model, f"training.{name}={json.dumps(value)}"), name)
    assert getattr(found, "value", found) == value


def test_incomplete_batches_are_dropped_in_training_only(world: Path, tiny_model: Path) -> None:
    plain = ["training.per_device_eval_batch_size=8"]  # 12 examples are held out
    dropping = [*plain, "training.dataloader_drop_last=true", f"output={world / 'dropping'}"]
    found = [
        train(load_recipe(write_recipe(world, tiny_model), each), console=Console(quiet=True))
        for each in (plain, dropping)
    ]
    assert found[0].before == found[1].before
    assert found[0].after == found[1].after


def test_label_smoothing_does_not_change_the_held_out_loss(world: Path, tiny_model: Path) -> None:
    given = ["training.label_smoothing_factor=0.3", "training.eval_steps=5"]
    smoothed, plain = (
        train(load_recipe(write_recipe(world, tiny_model), each), console=Console(quiet=True))
        for each in (given, [f"output={world / 'plain'}"])
    )
    assert smoothed.before == plain.before
    logged = json.loads((smoothed.folder / "results.json").read_text(encoding="utf-8"))["log"]
    last = [entry["eval_loss"] for entry in logged if "eval_loss" in entry][-1]
    assert smoothed.after["loss"] == last < max(entry["loss"] for entry in logged if "loss" in entry)


def test_label_smoothing_is_refused_in_regression(world: Path, tiny_model: Path) -> None:
    given = ["problem_type=regression", "data.label=rating", "training.label_smoothing_factor=0.1"]
    with pytest.raises(RecipeError, match="training.label_smoothing_factor: is for classification"):
        load_recipe(write_recipe(world, tiny_model), given)


def test_a_run_in_which_no_batch_would_be_complete_is_refused(world: Path, tiny_model: Path) -> None:
    given = ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=49"]
    with pytest.raises(
        RecipeError, match="dataloader_drop_last: drops all 48 training examples, because a batch"
    ):
        plan(load_recipe(write_recipe(world, tiny_model), given))


def test_a_schedule_of_the_learning_rate_gets_its_own_arguments(world: Path, tiny_model: Path) -> None:
    kind, kwargs = "training.lr_scheduler_type=cosine_with_min_lr", {"min_lr": 1e-5}
    found = arguments(world, tiny_model, kind, f"training.lr_scheduler_kwargs={json.dumps(kwargs)}")
    assert found.lr_scheduler_kwargs == kwargs
    with pytest.raises(RecipeError, match=r"lr_scheduler_kwargs: do not fit .*min_lr"):
        arguments(world, tiny_model, kind)


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_arguments_that_rankwise_sets_are_refused_by_name_with_a_remedy(
    world: Path, tiny_model: Path, name: str
) -> None:
    with pytest.raises(RecipeError, match=rf"training\.{name}: is not for a recipe: \S+"):
        load_recipe(write_recipe(world, tiny_model, **{f"training__{name}": True}))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("label_smoothing=0.1", "Did you mean 'label_smoothing_factor'?"),
        ("lr=0.1", "Did you mean 'learning_rate'?"),
        ("evaluation_strategy=epoch", "Did you mean 'eval_strategy'?"),
        ("patience=3", "Did you mean 'early_stopping_patience'?"),
        ("label_smoothing_factor=much", "must be of the type float, but is 'much'"),
        ("adam_beta1=true", "must be of the type float"),
        ("lr_scheduler_kwargs=[1]", "must be of the type dict"),
        ("lr_scheduler_type=liner", "Did you mean 'linear'?"),
        ("optim=adamw", "Transformers has no 'adamw'"),
        ("logging_strategy=sometimes", "sometimes is not a valid IntervalStrategy"),
        ("eval_strategy=sometimes", "must be one of no, steps, epoch"),
        ("metric_for_best_model=acuracy", "has no metric 'acuracy'. Did you mean 'accuracy'?"),
        ("early_stopping_patience=0", "must be at least 1"),
        ("eval_examples=0", "must be at least 1"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_read(
    world: Path, tiny_model: Path, override: str, said: str
) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(world, tiny_model), [f"training.{override}"])
    assert said in str(error.value)
    assert f"training.{override.partition('=')[0]}" in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["eval_strategy=steps", "eval_steps=2", "eval_delay=7"],
            "eval_delay: is 7 steps, but the run has 6,",
        ),
        (["eval_delay=3"], "eval_delay: is 3 epochs, but the run has 2,"),
        (["eval_strategy=steps", "eval_steps=2", "eval_delay=6"], None),
        (["eval_delay=2"], None),
        (["eval_strategy=no", "eval_delay=9"], None),
    ],
)
def test_a_first_evaluation_after_the_end_is_refused(
    world: Path, tiny_model: Path, overrides: list[str], said: str | None
) -> None:
    given = ["~training.max_steps", "training.num_train_epochs=2", "training.per_device_train_batch_size=16"]
    recipe = write_recipe(world, tiny_model, schedule=None)
    recipe = load_recipe(recipe, [*given, *(f"training.{each}" for each in overrides)])
    if said is None:
        assert plan(recipe).total_step == 6
    else:
        with pytest.raises(RecipeError, match=said):
            plan(recipe)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.early_stopping_patience=2", "training.eval_strategy=no"], "has no effect with eval_strategy: no"),
        (
            ["training.early_stopping_patience=2", "training.load_best_model_at_end=false"],
            "has no effect with load_best_model_at_end: false",
        ),
        (["training.eval_steps=2", "training.eval_strategy=epoch"], "has no effect with eval_strategy: epoch"),
        (["device=cuda", "training.use_cpu=true"], "but training.use_cpu is true"),
        (["learning_rate=0.1"], "training.learning_rate"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other_or_stand_in_the_wrong_section_are_refused(
    world: Path, tiny_model: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(world, tiny_model), overrides)
    assert said in str(error.value)


def test_both_names_of_gradient_checkpointing_mean_the_same(world: Path, tiny_model: Path) -> None:
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        read = load_recipe(write_recipe(world, tiny_model), [f"training.{name}=true"])
        assert read.training.gradient_checkpointing and not read.training.others


@pytest.mark.slow
def test_a_run_with_many_of_them_trains(world: Path, tiny_model: Path) -> None:
    given = ["label_smoothing_factor=0.1", "use_cpu=true", "run_name=mine", "torch_compile=true",
             "torch_compile_backend=eager", "adam_beta2=0.98", "logging_first_step=true", "save_strategy=epoch",
             "dataloader_persistent_workers=true", "dataloader_num_workers=1"]  # fmt: skip
    recipe = load_recipe(write_recipe(world, tiny_model), [f"training.{each}" for each in given])
    result = train(recipe, console=Console(quiet=True))
    assert result.after["loss"] > 0


# --- the device --------------------------------------------------------------------------------------------------

no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")


@no_gpu
@pytest.mark.parametrize("given", ["device=cuda", "training.fp16=true"])
def test_arguments_that_need_a_gpu_are_refused_without_one_and_the_plan_says_so(
    world: Path, tiny_model: Path, given: str
) -> None:
    recipe = load_recipe(write_recipe(world, tiny_model), [given])
    with pytest.raises(RecipeError, match=given.partition("=")[0]):
        train(recipe, console=Console(quiet=True))
    assert not (world / "out").exists()
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))
    console.print(plan(recipe))
    assert "`rankwise train` would refuse it here" in " ".join(console.export_text().split())


@no_gpu
def test_a_run_begins_with_a_line_about_device_precision_examples_and_length(
    world: Path, tiny_model: Path
) -> None:
    from io import StringIO

    console = Console(file=StringIO(), width=200)
    recipe = load_recipe(write_recipe(world, tiny_model), ["training.max_steps=5", "training.bf16=true"])
    train(recipe, console=console)
    first = console.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]
    assert first.startswith("Training on CPU (")
    assert (
        "mixed precision in bfloat16 over weights in float32: 48 examples, 5 steps of 4, 0.42 epochs."
        in first
    )


@no_gpu
def test_an_adapter_trained_on_a_gpu_predicts_without_one(world: Path, tiny_model: Path) -> None:
    from rankwise.recipes import evaluate

    train(load_recipe(write_recipe(world, tiny_model)), console=Console(quiet=True))
    saved = world / "out" / "recipe.yaml"
    saved.write_text(saved.read_text().replace("device: auto", "device: cuda"))
    assert evaluate(world / "out", world / "reviews.csv").values["accuracy"] >= 0


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "said"),
    [(5, 44, 16, "5 epochs"), (1, 44, 16, "1 epoch"), (0.5, 40, 10, "0.5 epochs")],
)
def test_the_epochs_that_a_plan_shows_are_the_recipes(
    world: Path, tiny_model: Path, epochs: float, rows: int, batch: int, said: str
) -> None:
    recipe = write_recipe(world, tiny_model, data__train_size=rows, data__held_out=5, schedule=None,
                          training={"num_train_epochs": epochs, "per_device_train_batch_size": batch})  # fmt: skip
    assert plan(load_recipe(recipe)).epochs == said


def test_defaults_are_those_that_the_documentation_gives() -> None:
    section = TrainingSection()
    assert (section.evaluates, section.saves, section.metric_for_best_model) == ("epoch", "steps", "loss")
    assert TrainingSection(eval_steps=5).evaluates == "steps"
