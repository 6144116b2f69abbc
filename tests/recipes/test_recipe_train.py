"""Plans and training of recipes on a tiny real model, with Transformers' Trainer."""

from __future__ import annotations

import json
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import rankwise as rw
from rankwise.recipes import RecipeError, Result, load_recipe, plan, predict, train
from rankwise.recipes.output import Output
from rankwise.recipes.plan import total_steps
from rankwise.recipes.recipe import TrainingSection
from recipe_world import rows as sentences
from recipe_world import save_tiny_model, write_recipe, write_table


def run(
    world: Path, model: Path, *overrides: str, resume: bool = False, overwrite: bool = False, **changes: Any
):
    console = Console(file=StringIO(), width=100)
    recipe = load_recipe(write_recipe(world, model, **changes), overrides)
    result = train(recipe, console=console, resume=resume, overwrite=overwrite)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


# --- plan --------------------------------------------------------------------------------------------------------


def test_a_plan_knows_phases_budget_and_parameters(world: Path, tiny_model: Path) -> None:
    planned = plan(load_recipe(write_recipe(world, tiny_model)))
    data = planned.to_dict()
    assert data["schedule"]["phases"] == {"warm-up": [1, 2], "pruning": [3, 8], "final": [9, 10]}
    assert data["budget"] == {"initial": 16, "target": 8}  # query and value in 2 layers, at rank 4 and then 2
    head = 16 * 3 + 3
    assert data["parameters"]["trainable_at_start"] == 4 * 4 * (16 + 16) + head
    assert data["parameters"]["trainable_at_end"] == 4 * 2 * (16 + 16) + head
    assert data["modules_to_save"] == ["classifier"]
    json.dumps(data)


def test_a_plan_reads_no_weights(world: Path, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "model.safetensors").unlink()
    assert plan(load_recipe(write_recipe(world, bare))).layers == 4


def test_the_plan_says_it_in_words(world: Path, tiny_model: Path) -> None:
    console = Console(file=StringIO(), width=100)
    console.print(plan(load_recipe(write_recipe(world, tiny_model))))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "BertForSequenceClassification",
        "48 examples",
        "negative, neutral",
        "16 → 8",
    ):
        assert words in " ".join(said.split())


def test_the_length_of_a_run_is_the_trainers(tiny_model: Path, world: Path) -> None:
    """Epochs, accumulation and a smaller last batch are counted as Transformers counts them."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    for rows, batch, accumulate, epochs in (
        (48, 5, 1, 1.0),
        (48, 5, 3, 2.0),
        (47, 4, 5, 1.5),
        (3, 8, 2, 1.0),
    ):
        arguments = TrainingArguments(
            str(world), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
            num_train_epochs=epochs, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            torch.nn.Linear(1, 1), arguments, train_dataset=Dataset.from_dict({"x": list(range(rows))})
        )
        loader = torch.utils.data.DataLoader(range(rows), batch_size=batch)
        expected = trainer.set_initial_training_values(arguments, loader)[-1]
        section = TrainingSection(
            num_train_epochs=epochs, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate
        )
        assert total_steps(section, rows) == expected


def test_targets_that_match_nothing_are_refused_before_weights_load(world: Path, tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match="adapter: .*querry") as error:
        plan(load_recipe(write_recipe(world, tiny_model, adapter__target_modules=["querry"])))
    assert "query" in str(error.value)


def test_a_folder_that_is_not_a_model_is_refused_by_name(world: Path) -> None:
    with pytest.raises(RecipeError, match="^model: .* can't be loaded as a model"):
        plan(load_recipe(write_recipe(world, world)))


def test_a_model_that_is_neither_here_nor_on_the_hub_is_refused_by_name(world: Path) -> None:
    with pytest.raises(
        RecipeError, match="^model: 'nobody/nothing' can't be loaded as a folder here or a model on"
    ):
        plan(load_recipe(write_recipe(world, Path("nobody/nothing"))))


def test_more_tokens_than_the_model_takes_are_refused(world: Path, tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match="data.max_length: is 64, but the model takes at most 32 tokens"):
        run(world, tiny_model, data__max_length=64)


# --- train -------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_prints_everything(world: Path, tiny_model: Path) -> None:
    write_table(world / "reviews.csv", 240)
    changes = {
        "training__max_steps": 120,
        "schedule__tinit": 0.1,
        "schedule__tfinal": 0.3,
        "training__eval_steps": 60,
    }
    result, said = run(world, tiny_model, training__learning_rate=0.02, training__logging_steps=20, **changes)
    assert result.interrupted is None
    assert result.after["accuracy"] > max(0.6, result.before["accuracy"] + 0.1)
    assert result.after["loss"] < result.before["loss"]
    words = " ".join(said.split())
    for part in (
        "trainable", "step 20/120 loss", "pruning budget", "final budget 8→8", "step 60: accuracy", "before after",
        "accuracy", "macro F1", "Trained 563 of", "the adapter keeps", "Saved to", "rankwise inspect",
        "rw.PeftModel.from_pretrained", "encoder.layer.1.attention.self.query", "rank 8 of 16",
    ):  # fmt: skip
        assert part in words, part


def test_the_folder_loads_in_peft_and_in_rankwise_and_predicts_alike(world: Path, tiny_model: Path) -> None:
    import peft
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    result, _ = run(world, tiny_model)
    folder = str(result.folder)
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["a great film", "the plot was bad"], return_tensors="pt", padding=True)

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(str(tiny_model), config=config)

    with torch.no_grad():
        ours = rw.PeftModel.from_pretrained(base(), folder).eval()(**inputs).logits
        theirs = peft.PeftModel.from_pretrained(base(), folder).eval()(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_printed_python_lines_run(world: Path, tiny_model: Path) -> None:
    result, said = run(world, tiny_model)
    lines = [line.removeprefix("  ") for line in said.partition("In Python:\n")[2].splitlines()]
    scope: dict[str, Any] = {"print": lambda value: scope.__setitem__("printed", value)}
    exec("\n".join(lines), scope)
    assert scope["printed"][0]["label"] in ("negative", "neutral", "positive")


def test_results_are_kept_as_data(world: Path, tiny_model: Path) -> None:
    result, _ = run(world, tiny_model)
    results = json.loads((result.folder / "results.json").read_text())
    assert results["finished"] is True
    assert results["before"] == result.before and results["after"] == result.after
    assert results["kept_parameters"] == result.kept_parameters < results["trainable_parameters"] == 563
    assert len(results["ranks"]["layers"]) == 4
    assert [entry["step"] for entry in results["log"] if "loss" in entry] == list(range(1, 11))


def test_the_saved_recipe_trains_the_same_run_from_anywhere(
    world: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    first, _ = run(world, tiny_model, data__train="reviews.csv", output="out")
    monkeypatch.chdir(tiny_model)
    saved = load_recipe(world / "out" / "recipe.yaml", [f"output={world}/again"])
    again = train(saved, console=Console(quiet=True))
    assert again.after == first.after


def test_regression_learns_a_number(world: Path, tiny_model: Path) -> None:
    write_table(world / "reviews.csv", 240)
    result, said = run(
        world, tiny_model, problem_type="regression", data__label="rating", training__max_steps=120,
        training__learning_rate=0.02, training__logging_steps=20, schedule=None,
    )  # fmt: skip
    assert result.after["mse"] < result.before["mse"]
    assert result.after["pearson"] > 0.5 and result.after["spearman"] > 0.5
    assert "mean squared error" in said and 'function_to_apply="none"' in said


def test_both_texts_of_a_pair_are_read(world: Path, tiny_model: Path) -> None:
    """The label depends on whether both texts have the same mood, so that neither alone determines it."""
    moods = [("good", "bad")[i % 2] for i in range(120)], [("good", "bad")[i // 2 % 2] for i in range(120)]
    lines = [f"{a} film {i},the {b} film,{a == b}" for i, (a, b) in enumerate(zip(*moods, strict=True))]
    (world / "pairs.csv").write_text("\n".join(["text,other,label", *lines]))
    result, _ = run(
        world, tiny_model, data__train=str(world / "pairs.csv"), data__text_pair="other", schedule=None,
        training__max_steps=150, training__learning_rate=0.02, training__per_device_train_batch_size=16,
    )  # fmt: skip
    assert result.after["accuracy"] > 0.9


def test_a_second_text_that_is_a_number_is_refused_in_training_and_in_predictions(
    world: Path, tiny_model: Path
) -> None:
    lines = [json.dumps({"text": text, "label": label, "other": "film"}) for text, label, _ in sentences(30)]
    (world / "pairs.jsonl").write_text("\n".join(lines))
    changes = {"data__train": str(world / "pairs.jsonl"), "data__text_pair": "other"}
    result, _ = run(world, tiny_model, **changes)
    (world / "pairs.jsonl").write_text("\n".join(lines).replace('"film"', "0"))
    with pytest.raises(
        RecipeError, match=r"pairs.jsonl, line 1 holds 0 in 'other', where a text is expected\."
    ):
        run(world, tiny_model, **changes, output=str(world / "other"))
    with pytest.raises(RecipeError, match="holds 0 in 'other'"):
        predict(result.folder, world / "pairs.jsonl", console=Console(quiet=True))


def test_lora_trains_too(world: Path, tiny_model: Path) -> None:
    adapter = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["query"]}
    result, said = run(world, tiny_model, adapter=adapter, schedule=None)
    assert json.loads((result.folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert result.kept_parameters == result.trainable_parameters
    assert "budget" not in said


def test_texts_too_long_are_cut_and_counted(world: Path, tiny_model: Path) -> None:
    _, said = run(world, tiny_model, data__max_length=4)
    assert "60 of 60 texts reach 4 tokens" in said


def test_weights_that_stay_random_are_reported(world: Path, tiny_model: Path) -> None:
    _, said = run(world, tiny_model, adapter__modules_to_save=["bert.pooler"], training__max_steps=5)
    assert "Random and frozen: the checkpoint has no weights for classifier." in " ".join(said.split())


def test_gradient_checkpointing_and_accumulation_change_no_loss(world: Path, tiny_model: Path) -> None:
    small = save_tiny_model(world / "m", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain, _ = run(world, small)
    kept, _ = run(world, small, output=str(world / "b"), training__gradient_checkpointing=True)
    assert kept.after["loss"] == pytest.approx(plain.after["loss"], rel=1e-5)
    split, _ = run(
        world, small, output=str(world / "c"),
        training__per_device_train_batch_size=2, training__gradient_accumulation_steps=2,
    )  # fmt: skip
    assert split.after["loss"] == pytest.approx(plain.after["loss"], rel=1e-3)


# --- the output folder -------------------------------------------------------------------------------------------


def test_a_finished_folder_is_not_overwritten_unless_asked(world: Path, tiny_model: Path) -> None:
    run(world, tiny_model)
    with pytest.raises(RecipeError, match="holds a finished adapter. To replace it, add --overwrite"):
        run(world, tiny_model)
    (world / "out" / "mine.txt").write_text("mine")
    result, _ = run(world, tiny_model, overwrite=True)
    assert result.after and (world / "out" / "mine.txt").read_text() == "mine"


def test_resuming_a_finished_run_does_nothing(world: Path, tiny_model: Path) -> None:
    first, _ = run(world, tiny_model)
    again, said = run(world, tiny_model, resume=True)
    assert "is finished: there is nothing to resume" in " ".join(said.split())
    assert again.after == first.after


def test_resuming_without_a_checkpoint_starts_from_the_beginning(world: Path, tiny_model: Path) -> None:
    result, said = run(world, tiny_model, resume=True)
    assert "starting from the beginning" in said
    assert result.after


class InterruptAt:
    """Sends the process a signal at a step, as a person or a job scheduler does."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def __enter__(self) -> None:
        from rankwise.recipes.progress import LiveProgress

        self._original = LiveProgress.on_step_end
        probe = self

        def on_step_end(callback: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == probe.step - 1:  # so that it arrives during the step
                signal.raise_signal(probe.number)
            return probe._original(callback, args, state, control, **kwargs)

        LiveProgress.on_step_end = on_step_end  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        from rankwise.recipes.progress import LiveProgress

        LiveProgress.on_step_end = self._original  # type: ignore[method-assign]


def interrupted(
    world: Path, model: Path, step: int, number: int = signal.SIGINT, **changes: Any
) -> tuple[Result, str]:
    with InterruptAt(step, number):
        return run(world, model, **changes)


@pytest.mark.parametrize("step", [2, 5, 9])
def test_a_run_that_was_stopped_and_resumed_is_the_same_run(world: Path, tiny_model: Path, step: int) -> None:
    """A run is stopped in each phase. All later losses, ranks, metrics and the adapter are equal, bit for bit."""
    whole, _ = run(world, tiny_model, output=str(world / "whole"), training__eval_steps=3)
    first, said = interrupted(world, tiny_model, step, training__eval_steps=3)
    assert first.interrupted == signal.SIGINT
    assert first.folder.name == f"checkpoint-{step}"
    assert f"rankwise train {world}/recipe.yaml --resume" in said
    second, said = run(world, tiny_model, resume=True, training__eval_steps=3)
    assert f"Continuing from checkpoint-{step}." in said
    assert second.before == whole.before and second.after == whole.after

    def kept(folder: Path) -> Any:
        results = json.loads((folder / "results.json").read_text())
        losses = [entry["loss"] for entry in results["log"] if "loss" in entry]
        return losses, results["ranks"], (folder / "rank_history.json").read_text()

    assert kept(world / "out") == kept(world / "whole")
    one, other = (load_file(world / name / "adapter_model.safetensors") for name in ("out", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_sigterm_saves_as_ctrl_c_does(world: Path, tiny_model: Path) -> None:
    result, _ = interrupted(world, tiny_model, 3, signal.SIGTERM)
    assert result.interrupted == signal.SIGTERM
    assert (world / "out" / "checkpoint-3" / "trainer_state.json").exists()


def test_the_command_that_goes_on_has_the_overrides(world: Path, tiny_model: Path) -> None:
    path = write_recipe(world, tiny_model)
    console = Console(file=StringIO(), width=100)
    with InterruptAt(3):
        train(
            load_recipe(path, ["training.seed=3", "data.labels=[negative, neutral, positive]"]),
            console=console,
        )
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        f"rankwise train {path} training.seed=3 'data.labels=[negative, neutral, positive]' --resume" in said
    )


def test_signals_are_left_as_they_were(world: Path, tiny_model: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupted(world, tiny_model, 3)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_unfinished_run_is_not_started_over_by_accident(world: Path, tiny_model: Path) -> None:
    interrupted(world, tiny_model, 3)
    with pytest.raises(RecipeError, match="holds an unfinished run. To resume it, add --resume"):
        run(world, tiny_model)


def test_resuming_with_another_recipe_is_refused_by_key(world: Path, tiny_model: Path) -> None:
    interrupted(world, tiny_model, 3)
    with pytest.raises(RecipeError, match="training.learning_rate was 0.01 and is 0.5 now"):
        run(world, tiny_model, "training.learning_rate=0.5", resume=True)
    result, _ = run(
        world, tiny_model, "training.logging_steps=5", resume=True
    )  # it changes nothing that is trained
    assert result.after


@pytest.mark.parametrize("grows", [True, False])
def test_resuming_on_other_data_is_refused_because_held_out_rows_would_have_trained(
    grows: bool, world: Path, tiny_model: Path
) -> None:
    interrupted(world, tiny_model, 3)
    before = (world / "out" / "results.json").read_text()
    write_table(world / "reviews.csv", 90 if grows else 60, seed=0 if grows else 7)
    said = r"48 .* 12 held out then, 7\d and 1\d now" if grows else "not the same"
    with pytest.raises(RecipeError, match=rf"data .* has changed: .*{said}.*--overwrite"):
        run(world, tiny_model, resume=True)
    assert (world / "out" / "results.json").read_text() == before
    write_table(world / "reviews.csv")
    result, _ = run(world, tiny_model, resume=True)
    assert result.after


def test_a_run_of_an_earlier_version_resumes_though_its_data_is_not_known(
    world: Path, tiny_model: Path
) -> None:
    interrupted(world, tiny_model, 3)
    file = world / "out" / "results.json"
    results = json.loads(file.read_text())
    assert results.pop("data")["train"] == 48
    file.write_text(json.dumps(results))
    result, _ = run(world, tiny_model, resume=True)
    assert result.after and json.loads(file.read_text())["data"]["held_out"] == 12


def test_a_checkpoint_that_was_cut_short_is_left_out(world: Path, tiny_model: Path) -> None:
    changes = {"training__save_steps": 3}
    interrupted(world, tiny_model, 7, **changes)
    (world / "out" / "checkpoint-7" / "trainer_state.json").write_text('{"epoch": 1.')
    result, said = run(world, tiny_model, resume=True, **changes)
    assert "checkpoint-7 was cut short" in said and "Continuing from checkpoint-6" in said
    assert result.after


def test_only_as_many_checkpoints_as_asked_are_kept(world: Path, tiny_model: Path) -> None:
    run(world, tiny_model, training__save_steps=2, training__save_total_limit=1)
    output = Output(load_recipe(world / "recipe.yaml"))
    assert [path.name for path in output.checkpoints()] == ["checkpoint-8"]


def test_a_file_in_the_place_of_the_output_is_refused(world: Path, tiny_model: Path) -> None:
    (world / "out").write_text("")
    with pytest.raises(RecipeError, match="which is a file"):
        run(world, tiny_model)


# --- two processes, one output -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_second_process_does_not_train_into_the_same_output(
    how: dict[str, bool], world: Path, tiny_model: Path
) -> None:
    recipe = load_recipe(write_recipe(world, tiny_model))
    with Output(recipe).claimed(resume=False, overwrite=False):
        before = sorted(Output(recipe).folder.iterdir())
        with pytest.raises(RecipeError, match="Another process is training into the output folder"):
            train(recipe, console=Console(file=StringIO()), **how)
        assert sorted(Output(recipe).folder.iterdir()) == before
    result = train(recipe, console=Console(file=StringIO()), **how)
    assert Output(recipe).finished and not (result.folder / ".rankwise-training").exists()


def test_a_run_that_ended_while_another_one_began_is_not_replaced(
    world: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.recipes import run as module

    recipe, real, runs = load_recipe(write_recipe(world, tiny_model)), module.attach, []

    def attach(*args: Any) -> Any:
        if not runs:
            runs.append(1)
            train(recipe, console=Console(file=StringIO()))
        return real(*args)

    monkeypatch.setattr(module, "attach", attach)
    with pytest.raises(RecipeError, match="holds a finished adapter"):
        train(recipe, console=Console(file=StringIO()))
    assert Output(recipe).finished


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_whole_model_in_the_output_folder_is_not_replaced(
    overwrite: bool, world: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(RecipeError, match=r"holds a whole model \(model.safetensors\).*another `output`"):
        run(world, base, f"output={base}", overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_recipe_of_the_user_in_the_output_folder_is_not_replaced(
    overwrite: bool, world: Path, tiny_model: Path
) -> None:
    path = write_recipe(world, tiny_model, output=str(world))
    path.write_text(path.read_text() + "# a note of the user\n")
    before = path.read_text()
    with pytest.raises(RecipeError, match="is where a run writes its whole recipe"):
        train(load_recipe(path), console=Console(file=StringIO()), overwrite=overwrite)
    assert path.read_text() == before


def test_a_run_can_be_repeated_from_the_recipe_that_it_wrote(world: Path, tiny_model: Path) -> None:
    result, _ = run(world, tiny_model)
    again = load_recipe(result.folder / "recipe.yaml")
    assert train(again, console=Console(file=StringIO()), overwrite=True).after == result.after


def test_an_output_folder_that_can_not_be_written_is_refused_before_anything_is_read(
    world: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    (world / "file").write_text("")
    with pytest.raises(RecipeError, match=r"/file' is read-only, or not a folder. Choose another `output`"):
        run(world, tiny_model, f"output={world / 'file' / 'out'}")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != world and real(path, mode))
    with pytest.raises(RecipeError, match="can't be written"):
        run(world, tiny_model, f"output={world / 'deep' / 'out'}")
    assert not (world / "deep").exists()
