"""A run that diverges ends with an error that names what is still good. A run that does not is left alone."""

from __future__ import annotations

import json
import math
import shlex
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.recipes import DivergedError, load_recipe, train
from rankwise.recipes.divergence import has_diverged, highest_sound_loss, last_sound_step
from recipe_world import write_recipe


def command(world: Path, model: Path, *overrides: str) -> Any:
    recipe = write_recipe(world, model)
    return CliRunner().invoke(app, ["train", str(recipe), *overrides])


def checkpoints(world: Path) -> list[str]:
    return sorted(path.name for path in (world / "out").iterdir() if path.is_dir())


# The learning rate rises within the run, so that the first steps are good.
RISING = ["training.warmup_steps=10", "training.max_steps=10", "training.save_steps=1"]


def test_a_rate_that_is_too_high_ends_with_an_error_and_no_adapter(world: Path, tiny_model: Path) -> None:
    result = command(world, tiny_model, "training.learning_rate=30", "training.save_steps=2")
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert "The run has diverged: the loss on held-out examples was 1." in said
    assert "What next" not in said and "Saved to" not in said and "fault of rankwise" not in said
    out = world / "out"
    assert not (out / "README.md").exists() and not (out / "adapter_config.json").exists()
    results = json.loads((out / "results.json").read_text())
    assert results["finished"] is False and results["diverged"] is True and results["log"]
    # The command in the message trains, and keeps the existing files.
    again = shlex.split(result.output.split("lower learning rate:")[1].strip().splitlines()[0])
    assert again[:2] == ["rankwise", "train"] and again[-2:] == [
        "training.learning_rate=3",
        f"output={out}-again",
    ]
    assert again.count("training.learning_rate=30") == 0


def test_a_loss_that_was_never_finite_is_not_put_down_to_the_learning_rate(
    world: Path, tiny_model: Path
) -> None:
    table = world / "reviews.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(f"{line}e30" for line in lines[1:])]) + "\n")
    result = command(world, tiny_model, "problem_type=regression", "data.label=rating")
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and "was inf before training" in said
    assert "no learning rate helps" in said and "Train again with a lower" not in said


def test_weights_that_are_not_finite_stop_the_run_and_the_last_good_checkpoint_is_named(
    world: Path, tiny_model: Path
) -> None:
    result = command(world, tiny_model, "training.learning_rate=1e30", *RISING)
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert "The run has diverged" in said and "fault of rankwise" not in said
    results = json.loads((world / "out" / "results.json").read_text())
    assert results["diverged"] is True and results["steps"] < 10, "it goes on to no purpose"
    for name in checkpoints(world):  # no checkpoint that can't be loaded
        rw.PeftModel.from_pretrained(base_of(tiny_model), world / "out" / name)


def base_of(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


def test_the_last_good_checkpoint_is_one_from_before(world: Path, tiny_model: Path) -> None:
    changes = {"training": {"max_steps": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2,
                            "per_device_train_batch_size": 4}}  # fmt: skip
    recipe = load_recipe(write_recipe(world, tiny_model, **changes))
    import transformers

    class Breaks(transformers.TrainerCallback):
        """Enlarges the head after step 5, so that the loss is finite but huge."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
            if state.global_step == 5:
                for name, parameter in model.named_parameters():
                    if "classifier" in name and parameter.requires_grad:
                        parameter.data.mul_(-1e4)

    console = Console(file=StringIO(), width=100)
    transformers.trainer.DEFAULT_CALLBACKS.append(Breaks)
    try:
        with pytest.raises(DivergedError, match="diverged") as raised:
            train(recipe, console=console)
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(Breaks)
    assert checkpoints(world) == ["checkpoint-2", "checkpoint-4"], "two are kept, and later ones are no good"
    assert "No checkpoint of step 6: the loss is " in console.file.getvalue()  # type: ignore[attr-defined]
    assert raised.value.checkpoint == world / "out" / "checkpoint-4"
    assert f"The last good checkpoint is '{world / 'out' / 'checkpoint-4'}'" in str(raised.value)
    rw.PeftModel.from_pretrained(base_of(tiny_model), world / "out" / "checkpoint-4")


@pytest.mark.parametrize("rate", ["1e-6", "0.01"])
def test_runs_that_learn_or_stagnate_give_no_false_alarm(world: Path, tiny_model: Path, rate: str) -> None:
    result = command(world, tiny_model, f"training.learning_rate={rate}")
    assert result.exit_code == 0, result.output
    assert "What next" in result.output and (world / "out" / "README.md").exists()


# --- the rule ------------------------------------------------------------------------------------------------------

losses = st.floats(1e-6, 1e6)


@given(losses, losses, st.lists(losses, min_size=1, max_size=5))
def test_a_run_of_finite_losses_has_diverged_only_if_both_are_far_above_the_first(
    before: float, after: float, training: list[float]
) -> None:
    log = [{"loss": loss, "step": step} for step, loss in enumerate(training)]
    found = has_diverged(before, after, log)
    assert found == (min(after, training[-1]) > highest_sound_loss(before))
    if found:
        assert after > 2 * before and training[-1] > 2 * before
    elif min(after, training[-1]) > 10 * before:
        pytest.fail("ten times the first loss is too much of any")


@given(losses, st.sampled_from([math.nan, math.inf]))
def test_a_held_out_loss_that_is_not_finite_has_diverged_and_a_logged_one_may_pass(
    before: float, broken: float
) -> None:
    fine = [{"loss": before / 2, "step": 1}]
    assert has_diverged(before, broken, fine) and has_diverged(before, broken, [])
    # The gradients of one step overflowed, and a gradient scaler skipped it.
    assert not has_diverged(before, before / 2, [*fine, {"loss": broken, "step": 2}])
    assert has_diverged(before, 100 * before + 1, [*fine, {"loss": broken, "step": 2}])
    # A batch without labels has no mean loss, even before training.
    assert not has_diverged(broken, broken, fine)
    assert has_diverged(broken, broken, [{"loss": broken, "step": 1}])


def test_a_run_too_short_to_log_a_loss_is_judged_by_its_mean() -> None:
    assert has_diverged(1.0, 50.0, [{"train_loss": 30.0, "step": 3}])
    assert not has_diverged(1.0, 0.9, [{"train_loss": 0.95, "step": 3}]) and not has_diverged(None, 5.0, [])


def test_the_last_sound_step_is_the_last_with_a_sound_loss() -> None:
    log = [
        {"loss": value, "step": step} for step, value in enumerate([2.0, 1.0, math.nan, 1.5, 80.0, math.inf])
    ]
    assert (
        last_sound_step(2.0, log) == 3 and last_sound_step(None, log) == 4 and last_sound_step(2.0, []) == 0
    )
