"""A run keeps its best adapter, among those whose ranks are final, and the folder records which step it is from."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from rankwise.recipes import RecipeError, Result, evaluate, load_recipe, train
from rankwise.recipes.best import KeepBest, best_folders, ranks_are_final
from rankwise.report import inspect_adapter, render_terminal
from recipe_world import write_recipe, write_table

STEPS, EVERY = 40, 4  # the final phase begins after step 20


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Texts to learn, and held-out texts with wrong labels: the more is learned, the higher is the held-out loss."""
    write_table(tmp_path / "reviews.csv", 60)
    table = write_table(tmp_path / "held-out.csv", 24, seed=5)
    turned = {"positive": "negative", "negative": "neutral", "neutral": "positive"}
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((row["text"], turned[row["label"]]) for row in rows)
    return tmp_path


class Watch(TrainerCallback):
    """Records at each evaluation the step, the loss, whether ranks are final, and all trained parameters."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seen: dict[int, tuple[float, bool, dict[str, torch.Tensor]]] = {}
        self.ranks: dict[int, list[int]] = {}
        self.stop_at = stop_at

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **more: Any
    ) -> None:
        trained = {
            name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad
        }
        if state.global_step:
            self.ranks[state.global_step] = [layer.rank for layer in model.rank_summary().layers]
            self.seen[state.global_step] = (metrics["eval_loss"], ranks_are_final(model), trained)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.stop_at == state.global_step + 1:
            signal.raise_signal(signal.SIGINT)


def run(
    world: Path, model: Path, watch: TrainerCallback | None = None, resume: bool = False, **changes: Any
) -> tuple[Result, str, dict[str, Any]]:
    settings: dict[str, Any] = {
        "schedule": {"tinit": 2, "tfinal": 20, "deltaT": 2},
        "training__max_steps": STEPS,
        "training__eval_steps": EVERY,
        "training__learning_rate": 0.02,
        "training__per_device_train_batch_size": 20,
        "training__lr_scheduler_type": "constant",
        "data": {"train": str(world / "reviews.csv"), "eval": str(world / "held-out.csv")},
    }
    recipe = load_recipe(write_recipe(world, model, **{**settings, **changes}))
    console = Console(file=StringIO(), width=120)
    result = train(recipe, console=console, resume=resume, callbacks=[watch] if watch else [])
    results = json.loads((world / "out" / "results.json").read_text()) if result.after else {}
    return result, console.file.getvalue(), results  # type: ignore[attr-defined]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_best_of_those_with_final_ranks_is_kept_and_the_folder_says_its_step(
    world: Path, tiny_model: Path
) -> None:
    watch = Watch()
    result, said, results = run(world, tiny_model, watch)
    final = {step: loss for step, (loss, is_final, _) in watch.seen.items() if is_final}
    earlier = {step: loss for step, (loss, is_final, _) in watch.seen.items() if not is_final}
    expected = min(final, key=final.__getitem__)
    assert min(earlier.values()) < final[expected], (
        "the test needs a better evaluation before ranks are final"
    )
    assert all(watch.ranks[step] == watch.ranks[STEPS] for step in final)
    assert expected < STEPS, "the test needs a run whose last step is not its best"
    assert results["best"]["step"] == expected and result.best is not None
    assert results["best"]["value"] == results["after"]["loss"] == pytest.approx(final[expected])
    assert f"It is the adapter of step {expected} of {STEPS}, which has the best held-out loss" in said
    assert f"{expected}, which has the best loss" in (world / "out" / "README.md").read_text()
    head = watch.seen[expected][2]["classifier.modules_to_save.default.weight"]
    torch.testing.assert_close(
        weights(world / "out")["base_model.model.classifier.weight"], head, rtol=0, atol=0
    )
    assert evaluate(world / "out", world / "reviews.csv").values  # it can be loaded
    shown = Console(file=StringIO(), width=200)
    render_terminal(inspect_adapter(world / "out"), shown)
    assert f"step {expected} of {STEPS}, which has the best loss" in shown.file.getvalue()  # type: ignore[attr-defined]
    assert not list(best_folders(world / "out"))
    assert not (world / "out" / "training_state.safetensors").exists()


def test_the_kept_adapter_predicts_as_it_did_when_it_was_evaluated(world: Path, tiny_model: Path) -> None:
    """The printed metrics are measured again, on the adapter in the folder."""
    result, _, _ = run(world, tiny_model)
    again = evaluate(world / "out", world / "held-out.csv").values
    assert again == pytest.approx(dict(result.after), rel=1e-5)


def test_the_last_adapter_is_kept_if_the_recipe_says_so(world: Path, tiny_model: Path) -> None:
    never = {"training__eval_strategy": "no", "training__eval_steps": None}
    for changes in ({"training__load_best_model_at_end": False}, never):
        result, said, results = run(world, tiny_model, output=str(world / "out"), **changes)
        assert result.best is None and results["best"] is None
        assert "It is the adapter of" not in said
        for path in (world / "out").iterdir():
            path.unlink()


def test_early_stopping_counts_only_evaluations_after_the_ranks_are_final(
    world: Path, tiny_model: Path
) -> None:
    watch = Watch()
    result, said, results = run(world, tiny_model, watch, training__early_stopping_patience=3)
    final = [step for step, (_, is_final, _) in watch.seen.items() if is_final]
    assert results["finished"] and results["best"]["step"] == final[0]
    assert results["steps"] == final[0] + 3 * EVERY < STEPS
    assert "Stopping: no better loss than at step" in said
    assert result.interrupted is None


def test_early_stopping_counts_no_earlier_evaluation_if_the_first_with_final_ranks_gives_no_number(
    world: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = KeepBest.on_evaluate

    def without_a_number(self: KeepBest, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if state.global_step == 20:  # the first with final ranks
            more["metrics"]["eval_accuracy"] = float("nan")
        return original(self, args, state, control, **more)

    monkeypatch.setattr(KeepBest, "on_evaluate", without_a_number)
    by_accuracy = {"training__metric_for_best_model": "accuracy", "training__early_stopping_patience": 3}
    _, _, results = run(world, tiny_model, **by_accuracy)
    assert results["best"]["step"] >= 20 + EVERY


def test_of_a_metric_that_should_grow_the_largest_value_is_the_best(world: Path, tiny_model: Path) -> None:
    write_table(world / "reviews.csv", 60)
    _, _, results = run(
        world, tiny_model, training__metric_for_best_model="accuracy", training__learning_rate=0.01
    )
    accuracies = {
        entry["step"]: entry["eval_accuracy"]
        for entry in results["log"]
        if "eval_accuracy" in entry and entry["step"] >= 20
    }
    assert results["best"]["value"] == max(accuracies.values())


def test_lora_has_final_ranks_from_the_start(world: Path, tiny_model: Path) -> None:
    adapter = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["query"]}
    _, _, results = run(world, tiny_model, adapter=adapter, schedule=None)
    losses = {entry["step"]: entry["eval_loss"] for entry in results["log"] if "eval_loss" in entry}
    assert results["best"]["step"] == min((step for step in losses if step), key=losses.__getitem__) < 20


def test_evaluations_while_training_look_at_some_examples_and_those_before_and_after_at_all(
    world: Path, tiny_model: Path
) -> None:
    """The number of rows is seen from the number of batches that the trainer asks for."""

    class Count(TrainerCallback):
        batches: list[int] = []
        now = 0

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            self.now += 1

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            self.batches.append(self.now)
            self.now = 0

    count = Count()
    recipe = load_recipe(
        write_recipe(world, tiny_model, data__held_out=20, training__eval_examples=8, training__eval_steps=5,
                     training__per_device_eval_batch_size=1)
    )  # fmt: skip
    train(recipe, console=Console(quiet=True), callbacks=[count])
    assert count.batches[0] == 20 and count.batches[-1] == 20
    assert set(count.batches[1:-1]) == {8}


def test_a_run_that_is_stopped_and_resumed_keeps_the_best_of_both_parts(
    world: Path, tiny_model: Path
) -> None:
    whole, _, expected = run(world, tiny_model, output=str(world / "out"))
    first = weights(world / "out")
    for path in (world / "out").iterdir():
        path.unlink()
    stopped, _, _ = run(world, tiny_model, Watch(stop_at=expected["best"]["step"] + EVERY + 1))
    assert stopped.interrupted == signal.SIGINT
    assert [path.name for path in best_folders(world / "out")] == [f"best-{expected['best']['step']}"]
    _, _, results = run(world, tiny_model, resume=True)
    assert results["best"] == expected["best"]
    again = weights(world / "out")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_run_killed_while_it_keeps_an_adapter_has_the_one_before(world: Path, tiny_model: Path) -> None:
    from rankwise.recipes.best import kept

    (world / "out" / "best-8").mkdir(parents=True)
    best = {"step": 8, "metric": "loss", "value": 1.0, "metrics": {"loss": 1.0}, "examples": 3}
    (world / "out" / "best-8" / "best.json").write_text(json.dumps(best))
    (world / "out" / "best-12").mkdir()  # without best.json, it is incomplete
    found = kept(world / "out")
    assert found is not None and found.step == 8


class Remove(TrainerCallback):
    """Removes the best adapter before it is restored, as a person who tidies up may do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for path in best_folders(self.folder):
            shutil.rmtree(path)


def test_a_best_adapter_that_is_gone_does_not_end_the_run(world: Path, tiny_model: Path) -> None:
    _, said, results = run(world, tiny_model, Remove(world / "out"))
    assert results["finished"] and results["best"] is None
    assert "The best adapter can't be kept, so the last one will be" in said
    assert evaluate(world / "out", world / "held-out.csv").values == pytest.approx(results["after"], rel=1e-5)


def test_a_new_run_ignores_the_best_adapter_of_an_earlier_run(world: Path, tiny_model: Path) -> None:
    (world / "out" / "best-8").mkdir(parents=True)
    best = {"step": 8, "metric": "loss", "value": -1.0, "metrics": {"loss": -1.0}, "examples": 3}
    (world / "out" / "best-8" / "best.json").write_text(json.dumps(best))
    _, _, results = run(world, tiny_model)
    assert results["best"]["value"] > 0


def test_a_metric_that_the_task_does_not_have_is_refused(world: Path, tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match="text-classification has no metric 'wer'. Valid: loss, accuracy"):
        load_recipe(write_recipe(world, tiny_model), ["training.metric_for_best_model=wer"])
