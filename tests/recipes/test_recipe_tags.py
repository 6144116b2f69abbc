"""Token classification: tags are assigned to the right tokens, entities count as wholes, wrong rows are named."""

from __future__ import annotations

import json
import random
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from language_world import write_lines
from rankwise.recipes import RecipeError, Result, load_recipe, plan, train
from rankwise.recipes.tasks import TaskData, load_task
from rankwise.recipes.tasks.token_classification import tag_metrics

NAMES = ["anna", "boris", "carla", "dilip", "elena", "farid"]
PLACES = ["rome", "oslo", "new york", "lima", "san juan"]
OTHERS = "went to from and met in yesterday with a friend of".split()


def sentences(count: int = 80) -> list[dict[str, Any]]:
    """Sentences of lower-case words that include people and places."""
    chance = random.Random(0)
    made = []
    for _ in range(count):
        tokens: list[str] = []
        tags: list[str] = []
        for kind in chance.choices(["O", "O", "PER", "LOC"], k=6):
            words = chance.choice({"O": OTHERS, "PER": NAMES, "LOC": PLACES}[kind]).split()
            tokens += words
            tags += ["O"] if kind == "O" else [f"B-{kind}"] + [f"I-{kind}"] * (len(words) - 1)
        made.append({"tokens": tokens, "ner_tags": tags})
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT whose tokenizer splits long words into pieces."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tagger")
    whole = [
        "[PAD]",
        "[UNK]",
        *"went to from and met in with a of new york rome oslo lima san juan an bo ca di el fa".split(),
    ]
    pieces = ["##na", "##ris", "##rla", "##lip", "##ena", "##rid", "yester", "##day", "fri", "##end"]
    vocabulary = {piece: i for i, piece in enumerate([*whole, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_lines(tmp_path / "people.jsonl", sentences())
    return tmp_path


def write_recipe(world: Path, model: Path, data: dict[str, Any] | None = None, **training: Any) -> Path:
    train = {"train": str(world / "people.jsonl"), "tags": "ner_tags", "held_out": 0.25}
    recipe = {
        "model": str(model),
        "task": "token-classification",
        "data": {**train, **(data or {})},
        "adapter": {"target_modules": "all-linear", "init_r": 4, "target_r": 2, "lora_alpha": 8},
        "schedule": {"tinit": 0.1, "tfinal": 0.3},
        "training": {"max_steps": 4, "learning_rate": 0.02, "logging_steps": 10, **training},
        "output": str(world / "out"),
    }
    recipe["data"] = {key: value for key, value in recipe["data"].items() if value is not None}
    path = world / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def run(world: Path, model: Path, data: dict[str, Any] | None = None, **training: Any) -> tuple[Result, str]:
    console = Console(file=StringIO(), width=110)
    result = train(load_recipe(write_recipe(world, model, data, **training)), console=console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def read(world: Path, model: Path, data: dict[str, Any] | None = None) -> TaskData:
    recipe = load_recipe(write_recipe(world, model, data))
    return load_task(recipe.task).read_data(recipe)


def refusal(world: Path, model: Path, data: dict[str, Any] | None = None) -> str:
    with pytest.raises(RecipeError) as error:
        read(world, model, data)
    return str(error.value)


def write_conll(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = ["-DOCSTART- -X- O", ""]
    for row in rows:
        lines += [f"{word} NN {tag}" for word, tag in zip(row["tokens"], row["ner_tags"], strict=True)] + [""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_tag_is_at_the_first_token_of_its_word(world: Path, model: Path) -> None:
    """Other tokens have no tag, because long words would count more than short ones."""
    write_lines(world / "people.jsonl", [{"tokens": ["Anna", "met", "friend"], "ner_tags": ["B-PER", "O", "O"]},
                                         {"tokens": ["a", "of"], "ner_tags": ["O", "O"]}])  # fmt: skip
    data = read(world, model, {"held_out": 1})
    assert data.labels == ["O", "B-PER"]
    labels = {len(row["labels"]): row["labels"] for row in [*data.train, *data.evaluation]}
    assert labels == {5: [1, -100, 0, 0, -100], 2: [0, 0]}


def test_a_conll_file_gives_the_same_examples_as_a_table(world: Path, model: Path) -> None:
    table = read(world, model)
    other = read(world, model, {"train": str(write_conll(world / "people.conll", sentences())), "tags": None})
    assert other.labels == table.labels == ["O", "B-LOC", "I-LOC", "B-PER"]
    assert list(other.train) == list(table.train) and list(other.evaluation) == list(table.evaluation)


def test_numbers_take_their_names_from_the_recipe_or_the_dataset(
    world: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["O", "B-LOC", "I-LOC", "B-PER"]
    rows = [{**row, "ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in sentences()]
    write_lines(world / "people.jsonl", rows)
    assert read(world, model).labels == ["0", "1", "2", "3"]
    assert read(world, model, {"labels": names}).labels == names
    said = refusal(world, model, {"labels": names[:3]})
    assert "has the tag 3, which has no name." in said and "people.jsonl, line 1 " in said

    import datasets

    def load_dataset(name: str, subset: str | None, split: str) -> Any:
        tags = datasets.List(datasets.ClassLabel(names=names))
        features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert set(read(world, model, {"train": "someone/people"}).labels or ()) == set(names)


def test_wrong_rows_are_named_by_file_and_line(world: Path, model: Path) -> None:
    good = {"tokens": ["anna", "met"], "ner_tags": ["B-PER", "O"]}
    for bad, said in (
        ({"tokens": ["anna"], "ner_tags": ["B-PER", "O"]}, "people.jsonl, line 2 has 1 words and 2 tags."),
        (
            {"tokens": ["anna", None], "ner_tags": ["B-PER", "O"]},
            "line 2 'tokens': a list of words is expected",
        ),
    ):
        write_lines(world / "people.jsonl", [good, bad, good])
        assert said in refusal(world, model)
    write_lines(world / "people.jsonl", [good, {"tokens": ["met"], "ner_tags": ["B-PRE"]}])
    said = refusal(world, model, {"labels": ["O", "B-PER"]})
    assert "data.tags: people.jsonl, line 2 has the unknown tag 'B-PRE'. Did you mean 'B-PER'?" in said
    write_lines(
        world / "people.jsonl", [good, {"tokens": [], "ner_tags": []}, {**good, "tokens": ["boris", "met"]}]
    )
    assert "1 row without words left out (people.jsonl, line 2)." in read(world, model).notes


def test_broken_conll_files_are_named_by_line(world: Path, model: Path) -> None:
    file = world / "people.conll"
    file.write_text("anna B-PER\nmet\n", encoding="utf-8")
    conll = {"train": str(file)}
    assert "data.train: people.conll, line 2: a word and its tag are expected, not 'met'." in refusal(
        world, model, conll
    )
    file.write_text("\n\n", encoding="utf-8")
    assert "has no sentences" in refusal(world, model, conll)
    file.write_text("# id = 1\nanna\tB-PER\n#\tO\n\nmet\tO\nin\tO\n", encoding="utf-8")
    said = refusal(world, model, {**conll, "labels": ["O", "I-PER"]})
    assert "people.conll, line 2 has the unknown tag 'B-PER'" in said


def test_long_sentences_are_cut_dropped_or_refused_as_the_recipe_says(world: Path, model: Path) -> None:
    rows = sentences(20)
    rows[5] = {"tokens": ["met"] * 50, "ner_tags": ["O"] * 50}
    write_lines(world / "people.jsonl", rows)
    cut = "1 of 20 examples longer than 32 tokens cut (people.jsonl, line 6)."
    assert cut in read(world, model).notes
    assert cut.replace("cut", "left out") in read(world, model, {"too_long": "drop"}).notes
    assert "data.too_long: people.jsonl, line 6 is longer than 32 tokens." in refusal(
        world, model, {"too_long": "error"}
    )


def test_missing_columns_and_double_labels_are_refused(world: Path, model: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(world, model, {"tags": "ner_tag", "labels": ["O", "O"]}))
    assert "data.tags: people.jsonl has no column 'ner_tag'" in str(error.value)
    assert "data.labels: 'O' appears twice." in str(error.value)


# --- metrics -----------------------------------------------------------------------------------------------------


def test_an_entity_counts_only_if_it_is_found_whole() -> None:
    names = ["O", "B-LOC", "I-LOC", "B-PER"]
    truth = np.array([[-100, 1, 2, 0, 3], [3, -100, 0, 0, -100]])
    guess = np.array([[9, 1, 0, 0, 3], [3, 9, 3, 0, 9]])
    found = tag_metrics(names, SimpleNamespace(predictions=guess, label_ids=truth))
    assert found["accuracy"] == pytest.approx(5 / 7)
    # Two of three entities are found. Four were predicted, one of them with a wrong end.
    assert found["recall"] == pytest.approx(2 / 3) and found["precision"] == pytest.approx(1 / 2)
    assert found["f1"] == pytest.approx(4 / 7)


def test_tags_that_are_not_entities_have_only_an_accuracy() -> None:
    one = np.array([[0, 1]])
    assert tag_metrics(["NOUN", "VERB"], SimpleNamespace(predictions=one, label_ids=one)) == {"accuracy": 1.0}


# --- training ----------------------------------------------------------------------------------------------------


def test_a_run_learns_entities_and_its_lines_run(world: Path, model: Path) -> None:
    result, said = run(world, model, max_steps=120)
    assert result.before["f1"] < 0.5 < 0.8 < result.after["f1"]
    assert result.after["accuracy"] > 0.9
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["task_type"] == "TOKEN_CLS" and config["modules_to_save"] == ["classifier"]
    assert "entity F1" in said and "accuracy of words" in said
    lines = [line.removeprefix("  ") for line in said.partition("In Python:\n")[2].splitlines()]
    scope: dict[str, Any] = {"print": lambda value: scope.__setitem__("printed", value)}
    exec("\n".join(lines), scope)
    assert {entity["entity_group"] for entity in scope["printed"]} <= {"PER", "LOC"}


def test_parts_of_speech_train_too(world: Path, model: Path) -> None:
    rows = [{**row, "ner_tags": [tag.replace("B-", "") for tag in row["ner_tags"]]} for row in sentences()]
    write_lines(
        world / "people.jsonl",
        [{**row, "ner_tags": [t.replace("I-", "") for t in row["ner_tags"]]} for row in rows],
    )
    _, said = run(world, model)
    assert "only accuracy is measured" in said and "entity F1" not in said


def test_a_plan_knows_the_head(world: Path, model: Path) -> None:
    planned = plan(load_recipe(write_recipe(world, model)))
    assert planned.architecture == "BertForTokenClassification"
    assert planned.labels == ("O", "B-LOC", "I-LOC", "B-PER") and planned.modules_to_save == ("classifier",)
