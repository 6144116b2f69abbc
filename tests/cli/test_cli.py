"""The command line from a user's view: help, exit codes, clear messages, Ctrl-C and resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rankwise
from command_world import SOURCE, running, wait_for_line
from rankwise.cli import app
from recipe_world import write_recipe


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["train", "plan", "inspect", "Exit codes: 0 done, 2 for mistakes that you can correct"]),
        (
            ["train"],
            ["RECIPE.yaml", "KEY=VALUE", "--resume", "--overwrite", "text-classification", "torchrun"],
        ),
        (["plan"], ["RECIPE.yaml", "--json", "without training"]),
        (["inspect"], ["FOLDER", "--json", "--plot"]),
        (["watch"], ["OUTPUT", "--once", "--every", "rankwise watch output"]),
        (["report"], ["ADAPTER", "--output", "--overwrite", "rankwise report adapter"]),
    ],
)
def test_help_lists_commands_and_options(words: list[str], said: list[str]) -> None:
    code, out, _ = call(*words, "--help")
    assert code == 0
    for each in said:
        assert each in " ".join(out.split()), each


def test_the_recipe_in_the_help_is_valid(world: Path, tiny_model: Path) -> None:
    import yaml

    train = next(each.callback for each in app.registered_commands if each.callback.__name__ == "train")  # type: ignore[union-attr]
    lines = (train.__doc__ or "").partition("A recipe:\n")[2]
    recipe = yaml.safe_load("\n".join(line.removeprefix("    ") for line in lines.splitlines()))
    recipe["model"], recipe["data"]["train"] = str(tiny_model), str(world / "reviews.csv")
    recipe["data"] |= {"text": "text", "label": "label"}
    (world / "help.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = call("plan", world / "help.yaml", "adapter.target_modules=[query]")
    assert (code, err) == (0, ""), err


def test_version() -> None:
    code, out, _ = call("--version")
    assert (code, out) == (0, f"rankwise {rankwise.__version__}\n")


def test_plan_shows_the_schedule(world: Path, tiny_model: Path) -> None:
    code, out, _ = call("plan", write_recipe(world, tiny_model), "schedule.tinit=3")
    assert code == 0
    assert "16 → 8" in out
    assert not (world / "out").exists()


def test_plan_as_json_is_only_json(world: Path, tiny_model: Path) -> None:
    code, out, _ = call("plan", write_recipe(world, tiny_model), "--json")
    assert code == 0
    assert json.loads(out)["budget"] == {"initial": 16, "target": 8}


def test_a_users_mistake_gives_one_message_and_exit_code_2(world: Path, tiny_model: Path) -> None:
    for words in (
        ("train", world / "none.yaml"),
        ("train", write_recipe(world, tiny_model), "training.max_step=5"),
        ("plan", write_recipe(world, tiny_model), "data.text=txt"),
        ("plan", write_recipe(world, tiny_model), "adapter.target_modules=[nothing]"),
        ("train", write_recipe(world, tiny_model), "--resume", "--overwrite"),
        ("inspect", world),
        ("inspect", world / "nothing"),
        ("train", write_recipe(world, tiny_model), "training.optim=no_such_optimizer"),
        ("train", write_recipe(world, tiny_model), "data.eval_split=test", "~data.held_out"),
    ):
        code, out, err = call(*words)
        assert code == 2, (words, out, err)
        assert "Traceback" not in out + err
        assert err.strip(), words


def test_an_internal_error_gives_a_traceback_and_exit_code_1(
    world: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("rankwise.recipes.run.make_plan", broken)
    code, _, err = call("plan", write_recipe(world, tiny_model))
    assert code == 1
    assert "Traceback" in err and "RuntimeError: a bug" in err and "fault of rankwise" in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(28, "No space left on device", "adapter_model.safetensors"),
            "on device: adapter_model.safetensors",
        ),
        (Exception("No space left on device (os error 28)"), "on device (os error 28)"),  # of tokenizers
    ],
)
def test_a_full_disk_is_reported_as_the_users_problem(
    world: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def full(*args: object) -> None:
        raise error

    monkeypatch.setattr("rankwise.recipes.run.save", full)
    code, _, err = call("train", write_recipe(world, tiny_model))
    assert code == 2
    assert f"No space left {said}. Complete checkpoints are kept" in err


@pytest.mark.parametrize(
    "largest",
    [4_000, pytest.param(8_000, marks=pytest.mark.slow), pytest.param(12_000, marks=pytest.mark.slow)],
)
def test_a_checkpoint_that_can_not_be_written_is_the_users_problem_and_the_run_resumes(
    world: Path, tiny_model: Path, largest: int
) -> None:
    """PyTorch's writer has errors of its own for optimizer.pt."""
    resource = pytest.importorskip("resource")
    recipe = write_recipe(world, tiny_model, training__save_steps=3)

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    with running("train", recipe, preexec_fn=limit_files) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert "Complete checkpoints are kept: continue with --resume." in err
    code, _, err = call("train", recipe, "--resume")
    assert code == 0, err


def test_an_adapter_that_can_not_be_written_in_the_end_is_saved_elsewhere(
    world: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk stops the first file of the output folder. Here a folder is in the place of that file."""
    places = world / "elsewhere"
    places.mkdir()
    (world / "out" / "tokenizer.json" / "taken").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(places))
    code, out, _ = call("train", write_recipe(world, tiny_model))
    assert code != 0
    (place,) = places.glob("rankwise-adapter-*")
    said = f"{world / 'out'} can't be written, so the trained adapter was saved in {place}."
    assert said in " ".join(out.split())
    assert (place / "adapter_model.safetensors").is_file()
    code, out, err = call("inspect", place)
    assert code == 0 and "encoder.layer.0.attention.self.query" in out


def test_a_missing_extra_is_named_with_its_install_command(
    world: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    for name in [name for name in sys.modules if name.startswith("rankwise.recipes")]:
        monkeypatch.delitem(sys.modules, name)
    code, _, err = call("plan", write_recipe(world, tiny_model))
    assert code == 2
    assert "omegaconf" in err and 'pip install "rankwise[train,report]"' in err


def test_a_missing_optuna_is_named_with_the_extra_of_sweeps(
    world: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = call("sweep", write_recipe(world, tiny_model))
    assert code == 2 and 'pip install "rankwise[sweep]"' in err


def test_train_then_inspect(world: Path, tiny_model: Path) -> None:
    code, out, err = call("train", write_recipe(world, tiny_model))
    assert code == 0, err
    assert f"rankwise inspect {world}/out" in out
    code, out, err = call("inspect", world / "out")
    assert code == 0, err
    assert "encoder.layer.0.attention.self.query" in out
    code, out, err = call("inspect", world / "out", "--json", "--plot", world / "ranks.png")
    assert code == 0, err
    json.loads(out)
    assert (world / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ctrl_c_saves_and_the_printed_command_goes_on(world: Path, tiny_model: Path) -> None:
    recipe = write_recipe(world, tiny_model, training__max_steps=150, schedule=None)
    with running("train", recipe, "training.seed=5") as process:
        wait_for_line(process, "step")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    command = next(line.strip() for line in out.splitlines() if line.strip().startswith("rankwise train"))
    assert command == f"rankwise train {recipe} training.seed=5 --resume"
    (checkpoint,) = (world / "out").glob("checkpoint-*")

    code, out, err = call(*command.split()[1:])
    assert code == 0, err
    steps = [line for line in out.splitlines() if line.startswith("step ") and "/150 " in line]
    assert f"Continuing from {checkpoint.name}." in out
    assert len(steps) == 150 - int(checkpoint.name.rpartition("-")[2])


def test_a_run_whose_output_nobody_reads_any_more_goes_on_to_its_end(world: Path, tiny_model: Path) -> None:
    recipe = write_recipe(world, tiny_model, training__max_steps=30)
    with running("train", recipe) as process:
        wait_for_line(process, "step  1/30")
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=120) == 0
        said = process.stderr.read()
    assert said.count("the run goes on without it") == 1 and "Traceback" not in said
    results = json.loads((world / "out" / "results.json").read_text())
    assert results["finished"] and results["steps"] == 30


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_run_whose_log_is_on_a_full_disk_goes_on_to_its_end(world: Path, tiny_model: Path) -> None:
    recipe = write_recipe(world, tiny_model)
    with open("/dev/full", "w") as full, running("train", recipe, stdout=full) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=120) == 0
    assert "(No space left on device): the run goes on without it" in said
    assert (world / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_ctrl_c_before_training_is_reported_and_ends_the_command(world: Path, tiny_model: Path) -> None:
    recipe = write_recipe(world, tiny_model, training__max_steps=100000, schedule=None)
    with running("train", recipe) as process:
        wait_for_line(process, "output")  # the plan is printed, and the model is being loaded
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in out + err


def test_help_needs_no_transformers(world: Path) -> None:
    code = "import sys, rankwise.cli; sys.exit(any(name in sys.modules for name in ('transformers', 'datasets')))"
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)}).returncode
        == 0
    )
