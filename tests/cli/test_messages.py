"""Messages of the command line when a user may be stuck: short, in its own words, and with a remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from command_world import SOURCE, running
from rankwise.cli import app
from recipe_world import save_tiny_model, write_recipe, write_table


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"})
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def real(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a real process, with the output that its user sees."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "200"}
    command = [sys.executable, "-m", "rankwise", *map(str, words)]
    return subprocess.run(command, text=True, env=environment, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its data, its model, and an adapter in ``out``."""
    folder = tmp_path_factory.mktemp("world")
    write_table(folder / "reviews.csv")
    code, _, err = call("train", write_recipe(folder, save_tiny_model(folder / "model")))
    assert code == 0, err
    return folder


@pytest.mark.parametrize(
    "words",
    [("inspect", "out"), ("evaluate", "out", "reviews.csv")],
    ids=lambda words: words[0],
)
def test_a_command_writes_nothing_of_other_libraries(world: Path, words: tuple[str, ...]) -> None:
    done = real(words[0], *(world / word for word in words[1:]))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_predictions_of_which_only_the_first_are_read_end_without_a_traceback(world: Path) -> None:
    write_table(world / "many.csv", 2000)
    with running("predict", world / "out", world / "many.csv") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("{")
        process.stdout.close()
        assert (process.wait(timeout=120), process.stderr.read()) == (141, "")


@pytest.mark.slow
def test_a_terminal_that_knows_few_letters_gets_codes_for_the_others(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = real("plan", world / "recipe.yaml")
    assert (done.returncode, done.stderr) == (0, "") and "\\u2502" in done.stdout
    done = real("predict", world / "out", "--text", "Żółw")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == "Żółw"


def test_a_plot_without_an_ending_is_refused_before_a_file_of_another_name_is_written(world: Path) -> None:
    code, _, err = call("inspect", world / "out", "--plot", world / "ranks")
    assert code == 2 and "its ending says the format" in err and not (world / "ranks.png").exists()


def test_a_path_with_brackets_is_printed_whole(world: Path) -> None:
    page, plot, cut = world / "page [b].html", world / "plot [b].png", world / "cut [b]"
    assert f"Report: {page}" in call("report", world / "out", "-o", page)[1]
    assert f"Heat map: {plot}" in call("inspect", world / "out", "--plot", plot)[1]
    assert f"Saved to {cut}" in call("compress", world / "out", "--rank", "1", "-o", cut)[1]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An address of the hub where nobody answers, and an empty cache."""
    from huggingface_hub import constants

    from rankwise.recipes.places import _hub_answers

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _hub_answers.cache_clear()


@pytest.mark.parametrize(("key", "kind"), [("model", "model"), ("data.train", "dataset")])
def test_missing_models_are_refused_soon_without_a_network(
    world: Path, no_network: None, key: str, kind: str
) -> None:
    began = time.monotonic()
    code, _, err = call("plan", world / "recipe.yaml", f"{key}=nobody/nothing")
    assert code == 2
    assert f"{key}: there is no file or folder 'nobody/nothing' here" in err
    assert f"can't be reached to look for a {kind} of that name" in err
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("given", "meant"), [("peft", "peft-lora"), ("merge", "merged"), ("sg-lang", "sglang")]
)
def test_a_target_that_does_not_exist_gets_a_suggestion(world: Path, given: str, meant: str) -> None:
    code, _, err = call("export", world / "out", "--to", given, "-o", world / "x")
    assert code == 2 and f"Did you mean '{meant}'?" in err


def test_every_option_with_a_few_values_suggests_the_nearest(world: Path) -> None:
    code, _, err = call("export", world / "out", "--to", "vllm", "-o", world / "x", "--dtype", "bfloat")
    assert code == 2 and "Did you mean 'bfloat16'?" in err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("recipe.yaml", "its adapter is in the folder that it names as `output`"),
        ("reviews.csv", "Give a folder with adapter_config.json"),
        ("out/adapter_model.safetensors", "Give the folder that the file lies in"),
    ],
)
def test_a_file_given_instead_of_an_adapter_gets_the_folder_suggested(
    world: Path, name: str, said: str
) -> None:
    code, _, err = call("inspect", world / name)
    assert code == 2 and said in err, err


def test_inspect_and_compress_count_the_same_parameters(world: Path) -> None:
    """The parameters of AdaLoRA's E, which a LoRA does not have, are counted separately from those of A and B."""
    import json

    from rankwise.report.inspect import inspect_adapter

    _, out, _ = call("compress", world / "out", "--dry-run", "--json")
    whole = max(point["parameters"] for point in json.loads(out))
    report = inspect_adapter(world / "out")
    assert sum(layer.parameters for layer in report.layers) - report.gate_parameters == whole
    _, said, _ = call("inspect", world / "out")
    assert f"{whole:,} in A and B of layers" in " ".join(said.split())


def test_the_key_device_is_known_and_checked(world: Path) -> None:
    code, _, err = call("plan", world / "recipe.yaml", "device=gpu")
    assert code == 2 and "must be one of auto, cpu, cuda, mps, xpu" in err
    code, out, err = call("plan", world / "recipe.yaml", "device=cpu")
    assert code == 0 and "device" in out and "CPU (" in out, err


def test_no_penalty_is_logged_if_there_is_none(world: Path) -> None:
    import json

    log = json.loads((world / "out" / "results.json").read_text())["log"]
    assert log and not any("orth_penalty" in entry for entry in log)
