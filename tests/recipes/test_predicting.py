"""Predictions and metrics of a saved adapter on new data: every task, PEFT's folders, and wrong folders."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from image_world import save_tiny_vit, write_image_recipe, write_photos
from language_world import (
    CHAT_TEMPLATE,
    chats,
    questions,
    save_language_model,
    save_tokenizer,
    write_language_recipe,
    write_lines,
)
from rankwise.cli import app
from rankwise.recipes import RecipeError, evaluate, load_recipe, predict, train
from rankwise.recipes.data import audio
from rankwise.recipes.predicting.job import Job
from rankwise.recipes.tasks.causal_lm.language import prompt_ids
from recipe_world import MOODS, rows, save_tiny_model, write_recipe, write_table
from speech_world import save_tiny_whisper, write_manifest, write_speech_recipe


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def trained(recipe: Path) -> dict[str, float]:
    """Train a recipe whose held-out examples are in a file. Return the final metrics."""
    return dict(train(load_recipe(recipe), console=Console(file=StringIO())).after)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A folder with an adapter in ``out`` that was trained on ``reviews.csv`` and measured on ``new.csv``."""
    world = tmp_path_factory.mktemp("reviews")
    write_table(world / "reviews.csv")
    write_table(world / "new.csv", 31, seed=4)
    changes = {"data__held_out": None, "data__eval": str(world / "new.csv"), "data__max_length": 6}
    trained(write_recipe(world, bert, **changes))
    return world


def written_metrics(world: Path) -> dict[str, float]:
    return dict(json.loads((world / "out" / "results.json").read_text())["after"])


# --- every task --------------------------------------------------------------------------------------------------


def text_world(world: Path, bert: Path) -> tuple[Path, str]:
    write_table(world / "reviews.csv")
    write_table(world / "new.csv", 30, seed=4)
    return write_recipe(world, bert, data__held_out=None, data__eval=str(world / "new.csv")), "new.csv"


def number_world(world: Path, bert: Path) -> tuple[Path, str]:
    write_table(world / "reviews.csv")
    write_table(world / "new.csv", 30, seed=4)
    numbers = {"data__label": "rating", "problem_type": "regression"}
    return write_recipe(
        world, bert, data__held_out=None, data__eval=str(world / "new.csv"), **numbers
    ), "new.csv"


def tag_world(world: Path, bert: Path) -> tuple[Path, str]:
    moods = {word for words in MOODS.values() for word in words}

    def sentences(seed: int) -> list[dict[str, Any]]:
        split = [text.split() for text, _, _ in rows(30, seed)]
        return [
            {"tokens": words, "tags": ["B-M" if word in moods else "O" for word in words]} for words in split
        ]

    write_lines(world / "old.jsonl", sentences(1))
    write_lines(world / "new.jsonl", sentences(2))
    data = {"train": str(world / "old.jsonl"), "eval": str(world / "new.jsonl")}
    return write_recipe(world, bert, task="token-classification", data=data), "new.jsonl"


def language_world(world: Path, bert: Path) -> tuple[Path, str]:
    model = save_language_model(world / "llama")
    write_lines(world / "old.jsonl", questions()[:40])
    write_lines(world / "new.jsonl", questions()[40:52])
    columns = {"prompt": "question", "completion": "answer"}
    data = {"train": str(world / "old.jsonl"), "eval": str(world / "new.jsonl"), **columns}
    path = write_language_recipe(world, model, data)
    path.write_text(path.read_text().replace("held_out: 0.25", "loss_on: completion"))
    return path, "new.jsonl"


def chat_world(world: Path, bert: Path) -> tuple[Path, str]:
    model = save_language_model(world / "llama", max_position_embeddings=256)
    write_lines(world / "old.jsonl", chats()[:40])
    write_lines(world / "new.jsonl", chats()[40:52])
    data = {"train": str(world / "old.jsonl"), "eval": str(world / "new.jsonl"), "messages": "messages"}
    path = write_language_recipe(world, model, data)
    path.write_text(path.read_text().replace("held_out: 0.25", "loss_on: all"))
    return path, "new.jsonl"


def speech_world(world: Path, bert: Path) -> tuple[Path, str]:
    model = save_tiny_whisper(world / "whisper")
    write_manifest(world)
    write_manifest(world / "new", 7)
    data = {"data__held_out": None, "data__eval": str(world / "new" / "manifest.csv")}
    return write_speech_recipe(world, model, **data), "new/manifest.csv"


def photo_world(world: Path, bert: Path) -> tuple[Path, str]:
    model = save_tiny_vit(world / "vit")
    write_photos(world, 24)
    (world / "new").mkdir()
    write_photos(world / "new", 9)
    data = {"data__held_out": None, "data__eval": str(world / "new" / "photos.csv")}
    data |= {"data__train": str(world / "photos.csv")}
    return write_image_recipe(world, model, **data), "new/photos.csv"


WORLDS = [text_world, number_world, tag_world, language_world, chat_world, speech_world, photo_world]


@pytest.mark.parametrize("make", WORLDS, ids=lambda make: make.__name__)
def test_each_task_is_measured_as_in_training_and_predicts_each_row(
    make: Callable[[Path, Path], tuple[Path, str]], tmp_path: Path, bert: Path
) -> None:
    recipe, new = make(tmp_path, bert)
    after = trained(recipe)
    measured = evaluate(tmp_path / "out", tmp_path / new, console=Console(quiet=True))
    assert measured.values == pytest.approx(after, rel=1e-5)
    found = predict(
        tmp_path / "out", tmp_path / new, batch_size=4, max_new_tokens=5, console=Console(quiet=True)
    )
    one_by_one = predict(
        tmp_path / "out", tmp_path / new, batch_size=1, max_new_tokens=5, console=Console(quiet=True)
    )
    assert len(found.columns["prediction"]) == measured.examples
    CHECKS[make.__name__](found.columns, after)
    same = [
        a == b for a, b in zip(found.columns["prediction"], one_by_one.columns["prediction"], strict=True)
    ]
    if make is number_world:
        assert found.columns["prediction"] == pytest.approx(one_by_one.columns["prediction"], rel=1e-4)
    else:
        assert all(same), "what else is in the batch changes a prediction"


def share_right(columns: Any, truth: str) -> float:
    pairs = list(zip(columns[truth], columns["prediction"], strict=True))
    return sum(true == guess for true, guess in pairs) / len(pairs)


def check_texts(columns: Any, after: dict[str, float]) -> None:
    assert share_right(columns, "label") == pytest.approx(after["accuracy"])
    assert all(1 / 3 <= score <= 1 for score in columns["prediction_score"])


def check_numbers(columns: Any, after: dict[str, float]) -> None:
    errors = [
        (float(true) - guess) ** 2
        for true, guess in zip(columns["rating"], columns["prediction"], strict=True)
    ]
    assert sum(errors) / len(errors) == pytest.approx(after["mse"], rel=1e-4)


def check_tags(columns: Any, after: dict[str, float]) -> None:
    pairs = [
        pair
        for true, guess in zip(columns["tags"], columns["prediction"], strict=True)
        for pair in zip(true, guess, strict=True)
    ]
    assert sum(true == guess for true, guess in pairs) / len(pairs) == pytest.approx(after["accuracy"])


def check_written(columns: Any, after: dict[str, float]) -> None:
    assert all(isinstance(text, str) for text in columns["prediction"])
    assert any(columns["prediction"])


def check_heard(columns: Any, after: dict[str, float]) -> None:
    import jiwer

    assert columns["audio"][0] == "clips/00.wav"
    # The tiny model gives one answer to everything. The test is whether its words are those that were measured.
    wer = jiwer.wer(columns["text"], [text or " " for text in columns["prediction"]])
    assert wer >= 0 and all(isinstance(text, str) for text in columns["prediction"])


def check_photos(columns: Any, after: dict[str, float]) -> None:
    assert columns["image"][0] == "photos/red/00.png"
    assert share_right(columns, "label") == pytest.approx(after["accuracy"])


CHECKS: dict[str, Callable[[Any, dict[str, float]], None]] = {
    "text_world": check_texts,
    "number_world": check_numbers,
    "tag_world": check_tags,
    "language_world": check_written,
    "chat_world": check_written,
    "speech_world": check_heard,
    "photo_world": check_photos,
}


# --- merged ------------------------------------------------------------------------------------------------------


def alone(folder: Path, found: Any, world: Path) -> list[Any]:
    """The predictions of Transformers alone, without rankwise, with a merged folder, for the same rows."""
    import torch
    import transformers
    from PIL import Image

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    assert type(model).__module__.startswith("transformers.")
    kind = config.architectures[0]
    if "Image" in kind:
        pictures = [Image.open(world / "new" / name).convert("RGB") for name in found["image"]]
        pixels = transformers.AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
        return [config.id2label[int(i)] for i in model(**pixels).logits.argmax(-1)]
    if "Whisper" in kind:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        heard = []
        for name in found["audio"]:
            sound = audio.decode(str(world / "new" / name), rate=16000, longest=30)
            features = processor(sound, sampling_rate=16000, return_tensors="pt").input_features
            (text,) = processor.batch_decode(
                model.generate(features, max_new_tokens=5), skip_special_tokens=True
            )
            heard.append(text.strip())
        return heard
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        if "CausalLM" in kind:
            written = []
            for prompt in found.get("question") or found["messages"]:
                chat = not isinstance(prompt, str)
                ids = (
                    tokenizer.apply_chat_template(
                        prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt,
                        add_generation_prompt=True, return_tensors="pt", return_dict=True,
                    )["input_ids"]
                    if chat
                    else torch.tensor([prompt_ids(tokenizer, prompt)])
                )  # fmt: skip
                ends = [tokenizer.eos_token_id, model.generation_config.eos_token_id]
                made = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                                      eos_token_id=[end for end in ends if end is not None] or None)  # fmt: skip
                written.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
            return written
        if "Token" in kind:
            tagged = []
            for words in found["tokens"]:
                encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
                best = model(**encoded).logits.argmax(-1)[0]
                first = [encoded.word_ids().index(word) for word in range(len(words))]
                tagged.append([config.id2label[int(best[at])] for at in first])
            return tagged
        logits = model(**tokenizer(list(found["text"]), padding=True, return_tensors="pt")).logits
        if config.num_labels == 1:
            return logits.reshape(-1).tolist()
        return [config.id2label[int(i)] for i in logits.argmax(-1)]


@pytest.mark.parametrize("make", WORLDS, ids=lambda make: make.__name__)
def test_each_task_merged_is_loaded_by_transformers_alone_and_predicts_the_same(
    make: Callable[[Path, Path], tuple[Path, str]], tmp_path: Path, bert: Path
) -> None:
    recipe, new = make(tmp_path, bert)
    if make is speech_world:  # the whole window, as Transformers has it
        recipe.write_text(recipe.read_text().replace("  max_seconds: 1.0\n", ""))
    trained(recipe)
    found = predict(tmp_path / "out", tmp_path / new, max_new_tokens=5, console=Console(quiet=True))
    code, said, error = call("export", tmp_path / "out", "--to", "merged", "-o", tmp_path / "merged")
    assert code == 0, error
    predicted = alone(tmp_path / "merged", found.columns, tmp_path)
    if make is number_world:
        assert predicted == pytest.approx(found.columns["prediction"], rel=1e-4)
    else:
        assert predicted == list(found.columns["prediction"])
    code, _, error = call("export", tmp_path / "out", "--to", "merged", "-o", tmp_path / "merged")
    assert code == 2 and "overwrite" in error


def test_llama_cpps_refusal_of_a_classifier_names_a_command_that_works(reviews: Path, tmp_path: Path) -> None:
    code, _, error = call("export", reviews / "out", "--to", "gguf", "-o", tmp_path / "a.gguf")
    assert code == 2 and "`--to merged`" in error and "Python" not in error
    code, said, error = call("export", reviews / "out", "--to", "merged", "-o", tmp_path / "merged")
    assert code == 0, error
    assert "BertForSequenceClassification.from_pretrained" in said
    code, _, error = call("export", reviews / "out", "--to", "merged", "-o", reviews / "out", "--overwrite")
    assert (
        code == 2 and "holds an adapter" in error and (reviews / "out" / "adapter_model.safetensors").exists()
    )


def test_a_classifier_of_pefts_is_merged_with_its_head(bert: Path, tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(tmp_path / "own")
    code, _, error = call(
        "export", tmp_path / "own", "--to", "merged", "-o", tmp_path / "merged", "--base", bert
    )
    assert code == 0, error
    made = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")(
        ["good film", "bad"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        made.bert.pooler.load_state_dict(
            base.bert.pooler.state_dict()
        )  # PEFT initializes it randomly, and does not save it
        torch.testing.assert_close(made(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


# --- the table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_the_table_has_all_columns_of_the_data_and_needs_no_labels(
    reviews: Path, tmp_path: Path, name: str
) -> None:
    lines = ["id,text", "007,good fine film", "008,", '009,"bad, very bad"']
    (tmp_path / "new.csv").write_text("\n".join(lines), encoding="utf-8")
    code, _, said = call(
        "predict", reviews / "out", tmp_path / "new.csv", "-o", tmp_path / name, "--probabilities"
    )
    assert code == 0, said
    assert "1 row without text in 'text': no prediction (new.csv, line 3)." in said
    if name.endswith(".csv"):
        found = list(csv.DictReader((tmp_path / name).open(encoding="utf-8")))
    else:
        found = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in found] == ["007", "008", "009"]
    assert not found[1]["prediction"] and found[2]["text"] == "bad, very bad"
    chances = {name: float(found[0][f"prediction_probability_{name}"]) for name in MOODS}
    assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
    assert found[0]["prediction"] == max(chances, key=chances.__getitem__)


def test_without_a_file_the_rows_go_to_the_standard_output_and_nothing_else_does(reviews: Path) -> None:
    code, out, _ = call("predict", reviews / "out", reviews / "new.csv", "--column", "mood")
    assert code == 0
    assert [json.loads(line)["mood"] in MOODS for line in out.splitlines()] == [True] * 31


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "data.labels=[neutral, negative, positive]",
            "labels are negative, neutral, positive, in this order",
        ),
        pytest.param(
            "device=cuda",
            "device: is 'cuda', but PyTorch",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_overrides_that_would_exchange_labels_or_be_ignored_are_refused(
    reviews: Path, override: str, said: str
) -> None:
    for command in ("evaluate", "predict"):
        code, _, err = call(command, reviews / "out", reviews / "reviews.csv", override)
        assert code == 2 and said in " ".join(err.split())


def test_keys_of_training_that_are_refused_by_now_do_not_keep_an_adapter_from_use(
    reviews: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(reviews / "out", folder)
    made = yaml.safe_load((folder / "recipe.yaml").read_text())
    made["training"] |= {
        "label_names": ["labels"],
        "gone": 1,
        "eval_strategy": "no",
        "early_stopping_patience": 3,
    }
    made["adapter"]["gone"], made["schedule"]["tinit"] = 1, -1
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made))
    for words in (
        ["predict", folder, reviews / "new.csv"],
        ["evaluate", folder, reviews / "new.csv"],
        ["export", folder, "--to", "merged", "-o", tmp_path / "merged"],
    ):
        code, _, said = call(*words)
        assert code == 0, said
    code, _, said = call("predict", folder, reviews / "new.csv", "training.gone=1")
    assert code == 2 and "training.gone: unknown key" in said


def test_a_sentence_longer_than_the_model_takes_gets_a_tag_for_every_word(tmp_path: Path, bert: Path) -> None:
    recipe, _ = tag_world(tmp_path, bert)
    trained(recipe)
    write_lines(tmp_path / "long.jsonl", [{"tokens": ["good", "film"] * 50}, {"tokens": []}])
    found = predict(tmp_path / "out", tmp_path / "long.jsonl", console=Console(quiet=True))
    long, empty = found.columns["prediction"]
    assert len(long) == 100 and set(long) <= {"B-M", "O"} and empty is None


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A folder with an adapter in ``out`` that was trained on chats."""
    world = tmp_path_factory.mktemp("chatting")
    trained(chat_world(world, bert)[0])
    return world


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": None}], "line 1 'messages': message 1 has no text under 'content'."),
        ([{"from": "human", "value": "hot"}], "line 1 'messages': message 1 has no text under 'role'."),
        ('[{"role": "user"}]', "line 1 'messages': a list of messages is expected, but it holds '[{"),
        (
            [{"role": "user", "content": "hot", "function_call": "look"}],
            "line 1 'messages': message 1 has 'function_call', which are not read.",
        ),
    ],
)
def test_chats_to_answer_are_checked_as_chats_to_learn(
    chatting: Path, tmp_path: Path, messages: Any, said: str
) -> None:
    write_lines(tmp_path / "asked.jsonl", [{"messages": messages}])
    with pytest.raises(RecipeError) as error:
        predict(chatting / "out", tmp_path / "asked.jsonl", console=Console(quiet=True))
    assert said in str(error.value)


def test_an_answer_at_the_end_of_a_chat_is_not_read(chatting: Path, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "what is not hot?"}]
    answered = [*asked, {"role": "assistant", "content": "cold"}]
    write_lines(tmp_path / "asked.jsonl", [{"messages": asked}, {"messages": answered}])
    found = predict(chatting / "out", tmp_path / "asked.jsonl", console=Console(quiet=True))
    assert len(set(found.columns["prediction"])) == 1


def test_a_chat_to_answer_that_the_template_refuses_is_named(tmp_path: Path, bert: Path) -> None:
    trained(chat_world(tmp_path, bert)[0])
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    save_tokenizer(tmp_path / "llama", strict + CHAT_TEMPLATE)
    rows = [chats()[0]["messages"], [{"role": "system", "content": "be short"}, *chats()[1]["messages"]]]
    write_lines(tmp_path / "asked.jsonl", [{"messages": turns} for turns in rows])
    with pytest.raises(RecipeError, match=r"asked.jsonl, line 2 can't be rendered: begin with the user\."):
        predict(tmp_path / "out", tmp_path / "asked.jsonl", console=Console(quiet=True))


def test_prompts_that_are_cut_are_counted_and_begin_as_texts_do(
    chatting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[{"role": "user", "content": "what is not hot? " * count}] for count in (100, 1)]
    write_lines(tmp_path / "asked.jsonl", [{"messages": turns} for turns in rows])
    read: list[list[int]] = []
    monkeypatch.setattr(
        Job, "run", lambda job, items, sizes, predict: read.extend(items) or [{"": ""} for _ in items]
    )
    found = predict(
        chatting / "out", tmp_path / "asked.jsonl", max_new_tokens=56, console=Console(quiet=True)
    )
    assert "1 of 2 prompts are longer than 200 tokens; the beginning of each is not read." in found.notes
    begin = AutoTokenizer.from_pretrained(chatting / "llama").bos_token_id
    assert [len(ids) for ids in read][0] == 200 and {ids[0] for ids in read} == {begin}


def test_broken_pictures_get_no_prediction_and_a_folder_needs_no_labels(tmp_path: Path, bert: Path) -> None:
    recipe, _ = photo_world(tmp_path, bert)
    trained(recipe)
    folder = tmp_path / "new" / "photos"
    picture = next(folder.rglob("*.png"))
    whole = picture.read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) - 25])
    found = predict(tmp_path / "out", folder, console=Console(quiet=True))
    guesses = dict(zip(found.columns["image"], found.columns["prediction"], strict=True))
    assert len(guesses) == 10 and guesses["cut.png"] is None
    assert "cut.png" in " ".join(found.notes)


# --- PEFT's folders ----------------------------------------------------------------------------------------------


def peft_folder(folder: Path, bert: Path, **config: Any) -> Path:
    """Save a PEFT adapter with a random head of three labels. Return the logits of a text."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, **config)
    peft.get_peft_model(base, lora).save_pretrained(folder)
    return folder


def test_a_folders_table_may_have_a_column_named_as_the_files(tmp_path: Path, bert: Path) -> None:
    recipe, _ = photo_world(tmp_path, bert)
    trained(recipe)
    photos = sorted(path.relative_to(tmp_path / "new") for path in (tmp_path / "new" / "photos").rglob("*.*"))
    lines = ["image,file_name", *(f"{number},{path}" for number, path in enumerate(photos))]
    (tmp_path / "new" / "metadata.csv").write_text("\n".join(lines))
    found = predict(tmp_path / "out", tmp_path / "new", console=Console(quiet=True)).columns
    assert found["file_name"] == list(map(str, photos))
    assert found["image"] == [str(number) for number in range(9)] and None not in found["prediction"]


def test_a_folder_of_peft_needs_no_recipe(tmp_path: Path, bert: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = peft_folder(tmp_path / "peft", bert, task_type="SEQ_CLS")
    write_table(tmp_path / "new.csv", 9)
    found = predict(folder, tmp_path / "new.csv", probabilities=True, console=Console(quiet=True))
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    tokens = AutoTokenizer.from_pretrained(bert)(
        list(found.columns["text"]), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        chances = model(**tokens).logits.softmax(-1)
    mine = [found.columns[f"prediction_probability_LABEL_{i}"] for i in range(3)]
    assert torch.allclose(torch.tensor(mine).T, chances, atol=1e-5)


def test_facts_that_a_folder_of_peft_lacks_can_be_given(tmp_path: Path, bert: Path, reviews: Path) -> None:
    folder = peft_folder(tmp_path / "peft", bert, modules_to_save=["classifier"])
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"auto_mapping": None, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"(?s)2 problems.*Add task=….*Add model=…"):
        predict(folder, reviews / "new.csv")
    overrides = ["task=text-classification", f"model={bert}"]
    said = predict(folder, reviews / "new.csv", overrides, console=Console(quiet=True))
    by_recipe = predict(
        folder, reviews / "new.csv", recipe=reviews / "recipe.yaml", console=Console(quiet=True)
    )
    assert len(said.columns["prediction"]) == len(by_recipe.columns["prediction"]) == 31


def test_an_untrained_head_is_refused(tmp_path: Path, bert: Path, reviews: Path) -> None:
    folder = peft_folder(tmp_path / "peft", bert)
    with pytest.raises(
        RecipeError, match=r"weights classifier\.bias, classifier\.weight: predictions would be random"
    ):
        predict(folder, reviews / "new.csv", recipe=reviews / "recipe.yaml")


def test_weights_that_were_random_and_frozen_in_training_are_made_again_with_a_warning(
    tmp_path: Path, bert: Path
) -> None:
    from transformers import BertConfig, BertModel

    shutil.copytree(bert, tmp_path / "model")
    BertModel(BertConfig.from_pretrained(bert), add_pooling_layer=False).save_pretrained(tmp_path / "model")
    write_table(tmp_path / "reviews.csv")
    write_table(tmp_path / "new.csv", 30, seed=4)
    changes = {"data__held_out": None, "data__eval": str(tmp_path / "new.csv")}
    after = trained(write_recipe(tmp_path, tmp_path / "model", **changes))
    measured = evaluate(tmp_path / "out", tmp_path / "new.csv", console=Console(quiet=True))
    assert measured.values == pytest.approx(after, rel=1e-5)
    assert "No file holds the weights of bert.pooler.dense" in " ".join(measured.notes)


# --- errors that the user must correct ---------------------------------------------------------------------------


def test_files_that_cannot_be_written_or_read_are_reported_before_anything_runs(
    reviews: Path, tmp_path: Path
) -> None:
    out, new = reviews / "out", reviews / "new.csv"
    taken = tmp_path / "taken.csv"
    taken.write_text("mine")
    table = tmp_path / "other.csv"
    table.write_text("review,prediction\ngood,x\n")
    wrong: list[tuple[list[object], str]] = [
        (
            ["predict", out, new, "-o", tmp_path / "p.xlsx"],
            "its ending says the format: give .csv, .tsv, .jsonl",
        ),
        (["predict", out, new, "-o", taken], "is there already. To replace it, add --overwrite"),
        (["predict", out, new, "-o", new, "--overwrite"], "is read by this very command"),
        (["predict", out, new, "-o", tmp_path / "no" / "p.csv"], "Make it first"),
        (["predict", tmp_path, new], "holds no adapter_config.json, so it is not an adapter's folder"),
        (["predict", out, tmp_path / "nothing.csv"], "there is no file or folder"),
        (
            ["predict", out, table],
            "has no column 'text'; it has review, prediction. Name the column: data.text=NAME",
        ),
        (
            ["predict", out, table, "data.text=review"],
            "Give the predictions another name, with --column NAME",
        ),
        (["predict", out, new, "model=/nowhere"], "there is no file or folder '/nowhere'"),
        (
            ["evaluate", out, table, "data.text=review"],
            "other.csv has no column 'label'; it has review, prediction. Name the column: data.label=NAME",
        ),
        (["evaluate", out, new, "-o", tmp_path / "m.csv"], "give .json"),
    ]
    for words, message in wrong:
        code, _, said = call(*words)
        assert code == 2 and message in said, f"{words}: {said}"
    assert taken.read_text() == "mine"


def test_a_read_only_folder_is_reported_before_anything_runs(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    can = os.access
    # The tests may run as a user who can write everywhere.
    monkeypatch.setattr("os.access", lambda path, *more: Path(path) != tmp_path and can(path, *more))
    monkeypatch.setattr(
        "rankwise.recipes.predicting.predict.predict", lambda *_, **__: pytest.fail("It ran.")
    )
    code, _, said = call("predict", reviews / "out", reviews / "new.csv", "-o", tmp_path / "p.csv")
    assert code == 2 and "p.csv: can't be written:" in said and "is read-only. Give another place." in said


def test_a_model_without_a_tokenizer_is_named_with_the_remedy(
    reviews: Path, bert: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(bert, tmp_path / "model")
    for path in [*model.glob("*token*"), *model.glob("vocab*")]:
        path.unlink()
    code, out, err = call("predict", reviews / "out", reviews / "new.csv", f"model={model}")
    assert (code, out) == (2, "")
    assert str(model) in err and "tokenizer.json" in err and err.strip().endswith("into that folder.")


def test_the_note_about_long_texts_counts_each_text_once(reviews: Path) -> None:
    measured = evaluate(
        reviews / "out", reviews / "new.csv", ["data.max_length=4"], console=Console(quiet=True)
    )
    assert any(note.startswith("31 of 31 texts reach 4 tokens") for note in measured.notes)


def test_a_label_that_the_adapter_does_not_know_is_named(reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("text,label\ngood film,positive\nbad film,horrible\n")
    with pytest.raises(RecipeError, match="line 3 has the unknown label 'horrible'"):
        evaluate(reviews / "out", tmp_path / "new.csv", console=Console(quiet=True))


def test_metrics_are_printed_and_written(reviews: Path, tmp_path: Path) -> None:
    code, out, said = call("evaluate", reviews / "out", reviews / "new.csv", "-o", tmp_path / "m.json")
    assert code == 0, said
    assert "On 31 examples of" in out and "accuracy" in out
    metrics = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert metrics == pytest.approx(written_metrics(reviews), rel=1e-5)


def test_metrics_are_printed_even_if_their_file_cannot_be_written(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankwise.files.atomic.write_file", full)
    code, out, said = call("evaluate", reviews / "out", reviews / "new.csv", "-o", tmp_path / "m.json")
    assert code == 2 and "No space left" in said and "On 31 examples of" in out and "accuracy" in out
