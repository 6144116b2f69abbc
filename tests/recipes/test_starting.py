"""`rankwise init`: what it takes the data for, and that its recipe is valid, gives reasons, and trains."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from image_world import write_photos
from language_world import chats, questions, write_lines
from rankwise.cli import app
from rankwise.recipes import load_recipe, train
from recipe_world import rows, save_tiny_model, write_table
from speech_world import write_manifest


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def sections(folder: Path) -> Path:
    """A table with an identifier, a title, a text, a label in a column of another name, and a year."""
    with (folder / "packages.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "name", "about", "section", "year"])
        for number, (text, label, _) in enumerate(rows(90)):
            writer.writerow([number, f"a{number} b", f"{text} and {text}", label, 2000 + number % 12])
    return folder / "packages.csv"


def numbers(folder: Path) -> Path:
    path = folder / "numbers.csv"
    lines = [f"{text},{at / 7:.3f}" for at, (text, _, _) in enumerate(rows(60))]
    path.write_text("\n".join(["review,score", *lines]))
    return path


def tagged(folder: Path) -> Path:
    made = [
        {"id": i, "tokens": text.split(), "tags": ["O"] * len(text.split())}
        for i, (text, *_) in enumerate(rows(30))
    ]
    return write_lines(folder / "tagged.jsonl", made)


def texts_in_folders(folder: Path) -> Path:
    for number, (text, label, _) in enumerate(rows(30)):
        (folder / "texts" / label).mkdir(parents=True, exist_ok=True)
        (folder / "texts" / label / f"{number}.txt").write_text(text)
    return folder / "texts"


def loose_texts(folder: Path) -> Path:
    (folder / "loose").mkdir()
    for number, (text, *_) in enumerate(rows(5)):
        (folder / "loose" / f"{number}.txt").write_text(text)
    return folder / "loose"


def recordings(folder: Path) -> Path:
    write_manifest(folder, 6)
    for path in (folder / "clips").iterdir():
        path.with_suffix(".txt").write_text("a word")
    return folder / "clips"


def manifest(folder: Path) -> Path:
    write_manifest(folder, 12)
    lines = (folder / "manifest.csv").read_text().splitlines()
    spoken = [
        f"{line.partition(',')[0]},{line.partition(',')[2]} is said {at}" for at, line in enumerate(lines[1:])
    ]
    (folder / "manifest.csv").write_text("\n".join([lines[0], *spoken]))
    return folder / "manifest.csv"


def photos(folder: Path) -> Path:
    write_photos(folder, 12)
    return folder / "photos"


def photo_table(folder: Path) -> Path:
    write_photos(folder, 12)
    return folder / "photos.csv"


def words_a_line(folder: Path) -> Path:
    (folder / "words.conll").write_text("Anna B-PER\nwent O\n\nOslo B-LOC\nis O\nold O\n")
    return folder / "words.conll"


def asked(folder: Path) -> Path:
    made = [{"prompt": each["question"], "completion": each["answer"]} for each in questions()]
    return write_lines(folder / "asked.jsonl", made)


def plain(folder: Path) -> Path:
    path = folder / "plain.csv"
    path.write_text("\n".join(["text", *(f"{text} number {at}" for at, (text, *_) in enumerate(rows(20)))]))
    return path


CASES: list[tuple[Any, str, dict[str, Any]]] = [
    (sections, "text-classification", {"text": "about", "label": "section"}),
    (lambda folder: write_table(folder / "reviews.csv"), "text-classification", {"text": "text", "label": "label"}),
    (numbers, "text-classification", {"text": "review", "label": "score"}),
    (texts_in_folders, "text-classification", {}),
    (tagged, "token-classification", {"tokens": "tokens", "tags": "tags"}),
    (words_a_line, "token-classification", {}),
    (asked, "causal-lm", {"prompt": "prompt", "completion": "completion", "loss_on": "completion"}),
    (lambda folder: write_lines(folder / "c.jsonl", chats()), "causal-lm", {"messages": "messages"}),
    (plain, "causal-lm", {"text": "text"}),
    (loose_texts, "causal-lm", {}),
    (photos, "image-classification", {}),
    (photo_table, "image-classification", {"image": "image", "label": "label"}),
    (recordings, "speech-recognition", {}),
    (manifest, "speech-recognition", {"audio": "audio", "text": "text"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "task", "columns"), CASES, ids=lambda value: getattr(value, "__name__", None)
)
def test_the_task_and_the_columns_are_guessed_and_the_recipe_is_valid(
    make: Any, task: str, columns: dict[str, Any], tmp_path: Path
) -> None:
    data = make(tmp_path)
    code, out, err = call("init", data, "-o", tmp_path / "recipe.yaml")
    assert code == 0, err
    recipe: Any = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.task == task
    found = recipe.data.model_dump()
    assert {key: found[key] for key in columns} == columns
    said = " ".join(out.split())
    assert f"task: {task}" in said and all(
        repr(name) in said for key, name in columns.items() if key != "loss_on"
    )
    text = (tmp_path / "recipe.yaml").read_text()
    assert "# Written by `rankwise init`. What was guessed:" in text
    for line in out.partition("Recipe:")[0].splitlines()[1:]:
        assert line in text, "the recipe says why"


def test_numbers_that_differ_are_learned_as_numbers(tmp_path: Path) -> None:
    call("init", numbers(tmp_path), "-o", tmp_path / "recipe.yaml")
    recipe: Any = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.problem_type == "regression"


def test_ratings_that_repeat_in_a_long_table_are_learned_as_numbers(tmp_path: Path) -> None:
    """Averages of a few people's ratings repeat: 1,417 of them are no labels."""
    for name in ("rating", "how funny"):
        lines = [f"{text} at {at},{at % 40 / 8 - 2:.3f}" for at, (text, _, _) in enumerate(rows(200))]
        (tmp_path / "rated.csv").write_text("\n".join([f"text,{name}", *lines]))
        code, out, err = call("init", tmp_path / "rated.csv", "-o", tmp_path / "r.yaml", "--overwrite")
        assert code == 0, err
        recipe: Any = load_recipe(tmp_path / "r.yaml")
        assert (recipe.data.label, recipe.problem_type) == (name, "regression")
        assert "40 different numbers" in out


def test_the_recipe_trains_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and recipe are in different folders, and the recipe finds the data from anywhere."""
    model = save_tiny_model(tmp_path / "model")
    for name in ("data", "recipes"):
        (tmp_path / name).mkdir()
    write_table(tmp_path / "data" / "reviews.csv", 90)
    monkeypatch.chdir(tmp_path)
    code, _, err = call("init", "data/reviews.csv", "-o", "recipes/mine.yaml", "--model", model)
    assert code == 0, err
    monkeypatch.chdir(tmp_path / "data")
    given = [f"output={tmp_path}/out", "training.max_steps=6", "adapter.target_modules=[query]"]
    result = train(load_recipe(tmp_path / "recipes" / "mine.yaml", given), console=Console(quiet=True))
    assert result.after["accuracy"] > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n3,4\n", "can't be guessed: it has the columns a, b"),
        ("text,label\n", "has no rows"),
        ("", "is empty"),
    ],
)
def test_data_that_cannot_be_guessed_is_reported_with_what_was_found(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "data.csv").write_text(text)
    code, _, err = call("init", tmp_path / "data.csv", "-o", tmp_path / "recipe.yaml")
    assert code == 2 and said in err, err
    assert not (tmp_path / "recipe.yaml").exists()


def test_an_existing_recipe_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    write_table(tmp_path / "reviews.csv")
    code, _, err = call("init", tmp_path / "reviews.csv", "-o", tmp_path / "recipe.yaml")
    assert code == 2 and "--overwrite" in err
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    code, _, err = call("init", tmp_path / "reviews.csv", "-o", tmp_path / "recipe.yaml", "--overwrite")
    assert code == 0, err


def test_names_that_yaml_takes_for_something_else_stay_names(tmp_path: Path) -> None:
    made = [{"no": text, "y": label, "n": i} for i, (text, label, _) in enumerate(rows(30))]
    (tmp_path / "odd.json").write_text(json.dumps(made))
    code, _, err = call("init", tmp_path / "odd.json", "-o", tmp_path / "recipe.yaml")
    assert code == 0, err
    recipe: Any = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.data.text, recipe.data.label) == ("no", "y")


def test_labels_of_several_lines_or_of_great_length_stay_in_their_comment(tmp_path: Path) -> None:
    made = [
        (text, ["training:\n  max_steps: 1", "x" * 5000][at % 2]) for at, (text, *_) in enumerate(rows(30))
    ]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *made])
    model, recipe = save_tiny_model(tmp_path / "model"), tmp_path / "recipe.yaml"
    code, _, said = call("init", tmp_path / "data.csv", "-o", recipe, "--model", model)
    assert code == 0, said
    assert (
        load_recipe(recipe).training.max_steps is None
        and max(map(len, recipe.read_text().splitlines())) < 200
    )


def test_a_column_without_values_holds_no_numbers_to_learn(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [{"text": text, "label": None} for text, *_ in rows(30)])
    code, _, said = call(
        "init",
        tmp_path / "data.jsonl",
        "-o",
        tmp_path / "recipe.yaml",
        "--model",
        save_tiny_model(tmp_path / "model"),
    )
    assert code == 0, said
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.task == "causal-lm"
