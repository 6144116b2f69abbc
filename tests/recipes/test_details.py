"""Details behind the metrics (confusions, mistakes, numbers, wrong words), and predictions for typed texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from image_world import save_tiny_vit, write_image_recipe, write_photos
from language_world import questions, save_language_model, write_language_recipe, write_lines
from rankwise.cli import app
from rankwise.recipes import evaluate, load_recipe, predict, train
from rankwise.recipes.details import confusion, scatter, wrong_words
from recipe_world import save_tiny_model, write_recipe, write_table


def call(*words: object, given: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], input=given, env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def trained(path: Path) -> dict[str, Any]:
    folder = train(load_recipe(path), console=Console(quiet=True)).folder
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text classifier in ``out``, and a regression in ``numbers``."""
    folder = tmp_path_factory.mktemp("world")
    write_table(folder / "reviews.csv", 90)
    model = save_tiny_model(folder / "model")
    trained(write_recipe(folder, model))
    numbers = {"problem_type": "regression", "data__label": "rating", "output": str(folder / "numbers")}
    trained(write_recipe(folder, model, **numbers))
    return folder


def test_the_confusion_is_that_of_the_predictions(world: Path) -> None:
    """They are counted again from the predictions of `predict` for the same rows."""
    found = evaluate(world / "out", world / "reviews.csv", console=Console(quiet=True))
    rows = predict(world / "out", world / "reviews.csv", console=Console(quiet=True)).rows()
    assert found.details is not None
    labels = found.details["labels"]
    for i, true in enumerate(labels):
        for j, guess in enumerate(labels):
            count = sum(row["label"] == true and row["prediction"] == guess for row in rows)
            assert found.details["matrix"][i][j] == count
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    surest = sorted((row["prediction_score"] for row in wrong), reverse=True)[:10]
    shown = found.details["mistakes"]
    assert [each["probability"] for each in shown] == pytest.approx(surest, abs=2e-4)
    told = {(row["text"], row["label"], row["prediction"]) for row in wrong}
    assert all((each["example"], each["truth"], each["predicted"]) in told for each in shown)


def test_a_run_keeps_them_and_its_page_shows_them(world: Path, tmp_path: Path) -> None:
    results = json.loads((world / "out" / "results.json").read_text())
    right = sum(results["details"]["matrix"][i][i] for i in range(3))
    total = sum(map(sum, results["details"]["matrix"]))
    assert right / total == pytest.approx(results["after"]["accuracy"]), "of the adapter that is kept"
    code, _, err = call("report", world / "out", "-o", tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert "Where it is right and wrong" in page and "The worst mistakes" in page
    assert all(each["truth"] in page for each in results["details"]["mistakes"])


def test_the_command_shows_and_draws_them(world: Path, tmp_path: Path) -> None:
    for name in ("out", "numbers"):
        code, out, err = call(
            "evaluate", world / name, world / "reviews.csv", "--plot", tmp_path / f"{name}.png"
        )
        assert code == 0, err
        assert "The worst mistakes" in out
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = call("evaluate", world / "out", world / "reviews.csv", "--json")
    assert code == 0 and json.loads(out)["details"]["kind"] == "confusion"


def test_numbers_stand_side_by_side_with_the_worst_first(world: Path) -> None:
    found = evaluate(world / "numbers", world / "reviews.csv", console=Console(quiet=True)).details
    assert found is not None and found["kind"] == "scatter"
    errors = [(a - b) ** 2 for a, b in zip(found["truth"], found["predicted"], strict=True)]
    measured = evaluate(world / "numbers", world / "reviews.csv", console=Console(quiet=True)).values["mse"]
    assert sum(errors) / len(errors) == pytest.approx(measured, rel=1e-4)
    worst = [abs(each["truth"] - each["predicted"]) for each in found["mistakes"]]
    assert worst == sorted(worst, reverse=True) and worst[0] ** 2 == pytest.approx(max(errors), rel=1e-4)


def test_pictures_are_named_by_their_files(tmp_path: Path) -> None:
    write_photos(tmp_path, 24)
    results = trained(write_image_recipe(tmp_path, save_tiny_vit(tmp_path / "vit")))
    files = {path.name for path in (tmp_path / "photos").rglob("*") if path.is_file()}
    assert results["details"]["mistakes"]
    assert all(each["example"] in files for each in results["details"]["mistakes"])


def test_wrong_words_are_counted_by_position() -> None:
    found = wrong_words(
        ["the cat sat down", "a cat came", "all right", ""],
        ["the hat sat", "a hat came in", "all right", "x"],
        str,
    )
    counted = {(each["word"], each["instead"]): each["count"] for each in found["wrong"]}
    assert counted == {("cat", "hat"): 2, ("down", ""): 1, ("", "in"): 1}
    assert {each["example"] for each in found["mistakes"]} == {"0", "1"}


def test_many_examples_are_thinned_evenly_and_long_examples_are_cut() -> None:
    made = scatter(list(range(5000)), [0.0] * 5000, lambda at: "x" * 1000)
    assert len(made["truth"]) == 500 and made["truth"][0] == 0 and made["truth"][-1] == 4990
    assert all(len(each["example"]) == 200 for each in made["mistakes"])
    made = confusion(["a", "b"], [0, 1, 1], [0, 0, 1], [0.9, 0.8, 0.7], str)
    assert made["matrix"] == [[1, 0], [1, 1]] and [each["example"] for each in made["mistakes"]] == ["1"]


# --- texts that are typed ----------------------------------------------------------------------------------------


def test_typed_texts_are_predicted_as_those_of_a_file(world: Path, tmp_path: Path) -> None:
    texts = ["a good film", "an awful, bad plot"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, expected, err = call("predict", world / "out", tmp_path / "texts.jsonl")
    assert code == 0, err
    typed = [word for text in texts for word in ("--text", text)]
    assert call("predict", world / "out", *typed)[1] == expected
    assert call("predict", world / "out", "-", given="\n".join(texts) + "\n\n")[1] == expected
    assert call("predict", world / "out", given="\n".join(texts))[1] == expected
    code, out, err = call("predict", world / "out", "--text", texts[0], "data.max_length=4")
    assert code == 0 and len(out.splitlines()) == 1, err


def test_a_language_model_goes_on_from_a_typed_prompt(tmp_path: Path) -> None:
    write_lines(tmp_path / "old.jsonl", questions()[:40])
    data = {"train": str(tmp_path / "old.jsonl"), "prompt": "question", "completion": "answer"}
    trained(write_language_recipe(tmp_path, save_language_model(tmp_path / "llama"), data))
    code, out, err = call("predict", tmp_path / "out", "--text", "how many", "--max-new-tokens", "3")
    assert code == 0, err
    assert set(json.loads(out)) == {"question", "prediction"}
    code, out, err = call("evaluate", tmp_path / "out", tmp_path / "old.jsonl")
    assert code == 0 and "prompt" in out and "expected" in out, err


@pytest.mark.parametrize(
    ("words", "given", "said"),
    [
        (["--text", "a", "reviews.csv"], None, "--text replaces a file"),
        (["--text", "  "], None, "There is an empty text"),
        (["-"], "\n", "There is no text"),
    ],
)
def test_texts_that_cannot_be_predicted_are_refused(
    world: Path, words: list[str], given: str | None, said: str
) -> None:
    code, _, err = call("predict", world / "out", *words, given=given)
    assert code == 2 and said in err, err


# --- time --------------------------------------------------------------------------------------------------------


def test_a_plan_measures_steps_on_request_and_writes_nothing(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(world / "events"))
    recipe = write_recipe(
        world,
        world / "model",
        output=str(world / "unused"),
        training__max_steps=2000,
        training__report_to="tensorboard",
        schedule=None,
    )
    code, out, err = call("plan", recipe, "--time", "--json")
    assert code == 0, err
    timing = json.loads(out)["time"]
    assert timing["training"] == pytest.approx(2000 * timing["step"]) and 0 < timing["step"] < 10
    assert not (world / "unused").exists() and not (world / "events").exists()
    code, _, err = call("plan", recipe, "--time", "--memory")
    assert code == 2 and "choose one" in err
