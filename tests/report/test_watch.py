"""`rankwise watch` shows a run in another process by reading its output folder, and does not disturb it."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("rich")

import rankwise as rw
from command_world import running
from rankwise.cli import app
from rankwise.report.watch import read_run_now
from recipe_world import save_tiny_model, write_recipe, write_table
from tiny import llama


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_table(tmp_path / "reviews.csv")
    save_tiny_model(tmp_path / "model")
    return tmp_path


@pytest.mark.slow
def test_a_run_is_seen_while_it_goes_on_and_to_its_end(world: Path) -> None:
    recipe = write_recipe(world, world / "model", training__max_steps=100, training__logging_steps=2)
    with running("train", recipe, stdout=subprocess.DEVNULL, stderr=None) as run:
        while not (world / "out" / "results.json").is_file() or not read_run_now(world / "out").log:
            assert run.poll() is None or (world / "out" / "rank_history.json").is_file()
            time.sleep(0.05)
        code, out, err = call("watch", world / "out", "--every", 0.1)
        assert run.wait(timeout=120) == 0
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert "of 100" in lines[0] and "loss" in lines[0] and "budget" in lines[0] and "written" in lines[0]
    assert "step 100" in lines[-1] and "finished" in lines[-1]
    results = json.loads((world / "out" / "results.json").read_text())
    ranks = [layer["rank"] for layer in results["ranks"]["layers"]]
    picture = [line.replace("░", " ").split() for line in out.splitlines() if line[:2] in ("0 ", "1 ")]
    assert [int(cell) for row in picture for cell in row[1:]] == ranks


def test_an_unfinished_run_keeps_the_metrics_before_training(world: Path) -> None:
    from transformers import TrainerState

    from rankwise.recipes import load_recipe
    from rankwise.recipes.output import Output
    from rankwise.recipes.progress import KeepResults

    model = rw.get_peft_model(llama(), rw.LoraConfig(r=2, target_modules=["q_proj"]))
    output = Output(load_recipe(write_recipe(world, world / "model")))
    output.write_results({"finished": False, "before": {"loss": 2.0}})
    state = TrainerState(global_step=7, max_steps=20, log_history=[{"step": 7, "loss": 1.5}])
    keeping = KeepResults(output)
    keeping.on_log(None, state, None, logs={"loss": 1.5}, model=model)
    state.global_step = 8
    keeping.on_log(None, state, None, logs={"loss": 1.4}, model=model)  # too soon to write again
    assert output.results["before"] == {"loss": 2.0} and not output.finished
    now = read_run_now(output.folder)
    assert (now.step, now.total_steps, now.finished) == (7, 20, False)
    assert now.ranks is not None and now.ranks.total_rank == model.rank_summary().total_rank
    assert "step 7 of 20, loss 1.5000" in now.line()


def test_checkpoints_of_any_trainer_show_a_run(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for step in (9, 10):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    state = {"global_step": 9, "max_steps": 30, "log_history": [{"step": 9, "loss": 0.25}]}
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text(json.dumps(state))
    code, out, err = call("watch", tmp_path, "--once")
    assert (code, err) == (0, "")
    assert "step 9 of 30, loss 0.2500" in out  # checkpoint 10 is incomplete: its last file is missing
    assert "rank 6 of 6" in out


def test_a_folder_without_a_run_gives_exit_code_2(tmp_path: Path) -> None:
    for folder, said in ((tmp_path / "nothing", "There is no folder"), (tmp_path, "holds nothing of a run")):
        code, out, err = call("watch", folder)
        assert code == 2 and said in err and out == ""


def test_watching_ends_with_a_run_that_was_stopped_or_has_diverged(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"finished": false, "steps": 7}')
    lock = tmp_path / ".rankwise-training"
    lock.touch()
    assert not read_run_now(tmp_path).stopped  # a process may be training
    lock.unlink()
    code, out, _ = call("watch", tmp_path)
    assert code == 0 and "stopped, written" in out


def test_a_sweep_is_not_taken_for_a_run_that_has_only_begun(tmp_path: Path) -> None:
    for name in ("sweep.json", "recipe.yaml"):
        (tmp_path / name).write_text("{}")
    code, out, err = call("watch", tmp_path)
    assert code == 2 and "holds a sweep" in err and out == ""


def test_a_run_that_has_only_begun_is_waited_for(world: Path) -> None:
    (world / "out").mkdir()
    (world / "out" / "recipe.yaml").write_text("model: x")
    code, out, _ = call("watch", world / "out", "--once")
    assert code == 0 and "Nothing is logged yet" in out
