"""Language models: the tokens that they learn from each form of text, exact perplexity, samples, and refusals."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from language_world import (
    CHAT_TEMPLATE,
    MARKED_TEMPLATE,
    chats,
    questions,
    save_as_gguf,
    save_language_model,
    save_tokenizer,
    write_language_recipe,
    write_lines,
)
from rankwise.recipes import RecipeError, Result, load_recipe, plan, train
from rankwise.recipes.tasks import load_task
from rankwise.recipes.tasks.causal_lm.language import (
    encode_chat,
    encode_completion,
    encode_text,
    pack,
    perplexity_metrics,
    token_losses,
)
from recipe_world import save_tiny_model, write_table


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("language-model"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_world(folder: Path) -> Path:
    write_lines(folder / "questions.jsonl", questions())
    write_lines(folder / "chats.jsonl", chats())
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Result:
    """The run that several tests compare with a run that differs in one setting."""
    folder = write_world(tmp_path_factory.mktemp("plain"))
    return run(folder, model, form(folder, "pairs"))[0]


def form(world: Path, name: str) -> dict[str, Any]:
    questions = {"train": str(world / "questions.jsonl")}
    pairs = {**questions, "prompt": "question", "completion": "answer", "loss_on": "completion"}
    return {
        "pairs": pairs,
        "chat": {**pairs, "chat": True},
        "messages": {
            "train": str(world / "chats.jsonl"),
            "messages": "messages",
            "loss_on": "completion",
        },
        "text": {**questions, "text": "question", "max_length": 16},
    }[name]


def run(world: Path, model: Path, data: dict[str, Any], **changes: Any) -> tuple[Result, str]:
    console = Console(file=StringIO(), width=110)
    recipe = load_recipe(write_language_recipe(world, model, data, **changes))
    result = train(recipe, console=console, overwrite=True)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def read(world: Path, model: Path, data: dict[str, Any], **changes: Any) -> Any:
    recipe = load_recipe(write_language_recipe(world, model, data, **changes))
    return load_task(recipe.task).read_data(recipe)


def refusal(world: Path, model: Path, data: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(RecipeError) as error:
        read(world, model, data, **changes)
    return str(error.value)


# --- tokens ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_split_as_it_will_be_when_the_model_writes(tokenizer: Any) -> None:
    """If the texts were joined first, the last space would become part of the completion's first token."""
    encoded = encode_completion(tokenizer, "what is it? ", "it is", limit=64)
    prompt = tokenizer("what is it? ")["input_ids"]
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.answer == [False] * len(prompt) + [True] * (len(encoded.ids) - len(prompt))
    assert tokenizer.decode(encoded.ids[len(prompt) :]) == "it is<|im_end|>"


def test_a_long_prompt_loses_its_beginning_and_no_word_of_the_completion(tokenizer: Any) -> None:
    prompt, completion = "hot " * 30, "it is cold."
    whole = encode_completion(tokenizer, prompt, completion, limit=1000)
    cut = encode_completion(tokenizer, prompt, completion, limit=20)
    assert cut.is_cut and not whole.is_cut
    assert cut.ids == whole.ids[-20:]
    short = encode_completion(tokenizer, prompt, "cold " * 30, limit=10)
    assert len(short.ids) == 10 and short.answer == [False] + [True] * 9


def test_a_cut_prompt_keeps_the_token_that_begins_a_text(tokenizer: Any) -> None:
    """Models that were trained with such a token at the start of every text fail without it."""

    class WithStart:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + tokenizer(text)["input_ids"]}

    cut = encode_completion(WithStart(), "hot " * 30, "it is cold.", limit=20)
    assert len(cut.ids) == 20 and cut.ids[0] == 1 and cut.ids[1] != 1
    assert not cut.answer[0]


def learned(tokenizer: Any, encoded: Any) -> str:
    return str(
        tokenizer.decode([token for token, mine in zip(encoded.ids, encoded.answer, strict=True) if mine])
    )


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "with generation marks"])
def test_only_the_assistants_turns_are_learned_each_with_its_end(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    messages = chats()[0]["messages"]
    encoded = encode_chat(tokenizer, messages, 64, answers_only=True)
    assert learned(tokenizer, encoded) == f"{messages[1]['content']}<|im_end|>yes.<|im_end|>"
    everything = encode_chat(tokenizer, messages, 64, answers_only=False)
    assert everything.ids == encoded.ids and all(everything.answer)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "with generation marks"])
def test_of_a_chat_that_the_assistant_begins_only_his_words_are_learned(
    tokenizer: Any, template: str
) -> None:
    """Many templates put a system prompt of their own before the first turn."""
    tokenizer.chat_template = "{{ '<|im_start|>system\nhelp.<|im_end|>\n' }}" + template
    words = ["ask me.", "what is not hot?", "it is cold."]
    turns = [
        {"role": role, "content": each}
        for role, each in zip(("assistant", "user", "assistant"), words, strict=True)
    ]
    encoded = encode_chat(tokenizer, turns, 64, answers_only=True)
    assert learned(tokenizer, encoded) == "ask me.<|im_end|>it is cold.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out(tokenizer: Any) -> None:
    """Some templates drop an assistant's reasoning once the next question follows."""
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}"
        "{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="changes earlier turns.*Say data.loss_on: all"):
        encode_chat(tokenizer, chats()[0]["messages"], 64, answers_only=True)


def test_packing_loses_no_token(tokenizer: Any) -> None:
    texts = [encode_text(tokenizer, row["question"]).ids for row in questions()]
    blocks = list(pack(texts, 16))
    assert [token for block in blocks for token in block] == [token for text in texts for token in text]
    assert {len(block) for block in blocks[:-1]} == {16}
    assert texts[0][-1] == tokenizer.eos_token_id


def test_every_token_counts_the_same_in_the_perplexity() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels[0, 2:], labels[1, :5] = -100, -100
    sums = token_losses((logits, "cache"), labels)
    assert sums[:, 1].tolist() == [1, 1, 5]
    every = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    metrics = perplexity_metrics(SimpleNamespace(predictions=sums.numpy()))
    assert metrics["token_loss"] == pytest.approx(every.item(), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(every.item()), rel=1e-6)


def test_a_perplexity_too_large_for_a_float_is_infinite() -> None:
    assert perplexity_metrics(SimpleNamespace(predictions=np.array([[9e5, 10.0]])))["perplexity"] == math.inf


# --- reading -----------------------------------------------------------------------------------------------------


def test_loss_is_on_all_tokens_unless_asked_for_completions_only(world: Path, model: Path) -> None:
    pairs = form(world, "pairs")
    everything, answers = read(world, model, {**pairs, "loss_on": "all"}), read(world, model, pairs)
    assert everything.train["labels"] == everything.train["input_ids"] == answers.train["input_ids"]
    for ids, labels in zip(answers.train["input_ids"], answers.train["labels"], strict=True):
        assert set(labels) - set(ids) == {-100}


def test_blocks_are_cut_after_documents_are_held_out(world: Path, model: Path) -> None:
    data = read(world, model, form(world, "text"))
    assert any("54 texts in" in note for note in data.notes) and any(
        "18 texts in" in note for note in data.notes
    )
    assert {len(ids) for ids in data.train["input_ids"][:-1]} == {16}
    assert len(data.train) == math.ceil(sum(map(len, data.train["input_ids"])) / 16)


def test_a_folder_of_texts_needs_no_columns_and_no_labels(world: Path, model: Path) -> None:
    for i, row in enumerate(questions()):
        file = world / "texts" / ("a" if i % 2 else "") / f"{i:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(row["question"], encoding="utf-8")
    (world / "texts" / "00.txt").write_text(" ")
    data = read(world, model, {"train": str(world / "texts"), "max_length": 16})
    assert "1 row without text left out (texts/00.txt)." in data.notes
    (world / "none").mkdir()
    assert "has no .txt files" in refusal(world, model, {"train": str(world / "none")})


def test_texts_need_not_be_packed(world: Path, model: Path) -> None:
    data = read(world, model, {**form(world, "text"), "packing": False, "max_length": 64})
    assert len(data.train) == 54 and len({len(ids) for ids in data.train["input_ids"]}) > 1


def test_chats_without_an_answer_to_learn_are_refused_with_the_reason(world: Path, model: Path) -> None:
    data = form(world, "messages")
    names = {"user": "human", "assistant": "gpt"}
    renamed = [
        {"messages": [{**turn, "role": names[turn["role"]]} for turn in chat["messages"]]} for chat in chats()
    ]
    write_lines(world / "chats.jsonl", renamed)
    said = refusal(world, model, data)
    assert "what the role 'assistant' says, but the roles are 'gpt', 'human'. Rename them" in said
    long = [
        {"messages": [{"role": "user", "content": "what " * 90}, chat["messages"][1]]} for chat in chats()
    ]
    write_lines(world / "chats.jsonl", long)
    assert "No answer begins in the first 64 tokens. Raise `data.max_length`" in refusal(world, model, data)


def test_long_examples_are_cut_dropped_or_refused_as_the_recipe_says(world: Path, model: Path) -> None:
    rows = questions()
    rows[4]["answer"] = rows[9]["answer"] = "cold " * 90
    write_lines(world / "questions.jsonl", rows)
    pairs = form(world, "pairs")
    cut = read(world, model, pairs)
    assert max(len(ids) for ids in [*cut.train["input_ids"], *cut.evaluation["input_ids"]]) == 64
    assert any("examples longer than 64 tokens cut (questions.jsonl, line " in note for note in cut.notes)
    dropped = read(world, model, {**pairs, "too_long": "drop"})
    assert len(dropped.train) + len(dropped.evaluation) == 70
    assert any("left out" in note for note in dropped.notes)
    said = refusal(world, model, {**pairs, "too_long": "error"})
    assert "data.too_long: questions.jsonl, line 5 is longer than 64 tokens." in said


def test_a_chat_whose_answer_is_cut_off_is_left_out_and_reported(world: Path, model: Path) -> None:
    rows = chats()
    rows[4]["messages"][0]["content"] = "cold " * 90
    write_lines(world / "chats.jsonl", rows)
    data = read(world, model, form(world, "messages"))
    assert len(data.train) + len(data.evaluation) == 71
    assert any(
        "nothing to learn in their first 64 tokens left out (chats.jsonl, line 5)" in n for n in data.notes
    )


def test_wrong_messages_are_named_by_file_and_line(world: Path, model: Path) -> None:
    rows = chats()
    rows[2]["messages"][1] = {"role": "assistant", "content": None}
    rows[3]["messages"] = []
    write_lines(world / "chats.jsonl", rows)
    said = refusal(world, model, form(world, "messages"))
    assert "data.messages: chats.jsonl, line 3 'messages': message 2 has no text under 'content'." in said
    rows[2] = chats()[2]
    write_lines(world / "chats.jsonl", rows)
    notes = read(world, model, form(world, "messages")).notes
    assert "1 row without messages left out (chats.jsonl, line 4)." in notes
    said = refusal(
        world,
        model,
        {**form(world, "messages"), "train": str(world / "questions.jsonl"), "messages": "answer"},
    )
    assert "questions.jsonl, line 1 'answer': a list of messages is expected, but it holds 'it is" in said


def test_what_a_message_says_outside_its_content_is_refused_or_named(world: Path, model: Path) -> None:
    rows = chats()
    rows[2]["messages"][1] = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
    write_lines(world / "chats.jsonl", rows)
    said = refusal(world, model, form(world, "messages"))
    assert "chats.jsonl, line 3 'messages': message 2 has 'tool_calls', which are not read." in said
    rows[2] = chats()[2]
    rows[5]["messages"][1]["reasoning_content"] = "opposites"
    write_lines(world / "chats.jsonl", rows)
    notes = read(world, model, form(world, "messages")).notes
    assert "Only 'role' and 'content' of the 'messages' are read, and not 'reasoning_content'." in notes


def test_empty_prompts_and_completions_are_left_out_and_reported(world: Path, model: Path) -> None:
    rows = questions()
    rows[1]["question"], rows[2]["answer"] = " ", ""
    write_lines(world / "questions.jsonl", rows)
    data = read(world, model, form(world, "pairs"))
    assert len(data.train) + len(data.evaluation) == 70
    assert {"1 row without text left out (questions.jsonl, line 2).",
            "1 row without text left out (questions.jsonl, line 3)."} <= set(data.notes)  # fmt: skip


def test_a_chat_that_the_template_refuses_is_named(world: Path, model: Path) -> None:
    strict = save_language_model(world / "strict")
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    save_tokenizer(strict, template)
    rows = chats()
    rows[6]["messages"].insert(0, {"role": "system", "content": "be short"})
    write_lines(world / "chats.jsonl", rows)
    said = refusal(world, strict, {**form(world, "messages"), "loss_on": "all"})
    assert "data.messages: chats.jsonl, line 7 can't be rendered: begin with the user." in said


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ({"prompt": "question"}, "`prompt` and `completion` belong together"),
        ({"text": "question", "messages": "messages"}, "three forms: choose one"),
        ({"text": "question", "loss_on": "completion"}, "`loss_on: completion` needs"),
        ({"text": "question", "chat": True}, "`chat` is for `prompt` and `completion`"),
        (
            {"prompt": "question", "completion": "anser"},
            "has no column 'anser'; it has question, answer. Did you mean",
        ),
        ({"text": "question", "max_length": 2}, "data.max_length: must be at least 4"),
        ({"text": "question", "too_long": "cut"}, "data.too_long: must be one of truncate, drop, error"),
        ({}, "data.text: questions.jsonl has no column 'text'"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    world: Path, model: Path, data: dict[str, Any], rule: str
) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write_language_recipe(world, model, {"train": str(world / "questions.jsonl"), **data}))
    assert rule in str(error.value)


def test_more_tokens_than_the_model_takes_are_refused(world: Path, model: Path) -> None:
    said = refusal(world, model, {**form(world, "pairs"), "max_length": 100})
    assert "data.max_length: is 100, but the model takes at most 64 tokens" in said


def test_an_encoder_which_sees_the_tokens_to_predict_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "reviews.csv")
    data = {"train": str(tmp_path / "reviews.csv"), "text": "text", "max_length": 16}
    for kind, decodes in (("encoder", False), ("decoder", True)):
        model = save_tiny_model(tmp_path / kind, is_decoder=decodes)
        tokenizer = AutoTokenizer.from_pretrained(model, eos_token="[UNK]")
        tokenizer.save_pretrained(model)
        recipe = load_recipe(write_language_recipe(tmp_path, model, data))
        if decodes:
            assert plan(recipe).architecture == "BertLMHeadModel"
        else:
            with pytest.raises(
                RecipeError, match=r"is an encoder \(bert\), whose tokens see those that follow"
            ):
                plan(recipe)


def test_a_model_without_a_chat_template_is_refused_for_chats(world: Path) -> None:
    bare = save_language_model(world / "bare")
    (bare / "chat_template.jinja").unlink()
    assert "data.messages: the model's tokenizer has no chat template" in refusal(
        world, bare, form(world, "messages")
    )
    assert "data.chat: the model's tokenizer has no chat template" in refusal(
        world, bare, form(world, "chat")
    )
    assert read(world, bare, form(world, "pairs")).train


def test_samples_are_checked(world: Path, model: Path) -> None:
    for value in (-1, ["what?", " "]):
        with pytest.raises(RecipeError, match="samples: must"):
            load_recipe(write_language_recipe(world, model, form(world, "pairs"), samples=value))


# --- training ----------------------------------------------------------------------------------------------------


def test_a_run_learns_the_answers_and_shows_what_it_writes(world: Path, model: Path) -> None:
    result, said = run(
        world, model, form(world, "chat"), training__max_steps=60, training__per_device_train_batch_size=16,
        samples=["what is not hot?"],
    )  # fmt: skip
    assert result.after["perplexity"] < 8 < 100 < result.before["perplexity"]
    assert result.after["perplexity"] == pytest.approx(math.exp(result.after["loss"]))
    results = json.loads((result.folder / "results.json").read_text())
    (sample,) = results["samples"]
    assert sample["prompt"] == "what is not hot?" and sample["after"].startswith("it is") and sample["before"]
    for words in ("perplexity", "loss per token", "prompt    what is not hot?", "after     it is"):
        assert words in said
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["modules_to_save"] is None


def test_the_perplexity_is_exact_whatever_the_batches(world: Path, model: Path, plain: Result) -> None:
    from transformers import AutoModelForCausalLM

    other, _ = run(world, model, form(world, "pairs"), training__per_device_eval_batch_size=7)
    assert other.before["loss"] == pytest.approx(plain.before["loss"], rel=1e-6)
    data = read(world, model, form(world, "pairs"))
    base = AutoModelForCausalLM.from_pretrained(str(model))
    total = count = 0.0
    for row in data.evaluation:
        labels = torch.tensor([row["labels"]])
        learned = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += base(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item() * learned
        count += learned
    assert plain.before["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["pairs", "messages", "text"])
def test_the_printed_python_lines_give_the_texts_that_the_run_has_shown(
    world: Path, model: Path, name: str
) -> None:
    result, said = run(world, model, form(world, name))
    lines = [line.removeprefix("  ") for line in said.partition("In Python:\n")[2].splitlines()]
    scope: dict[str, Any] = {"print": lambda value: scope.__setitem__("printed", value)}
    exec("\n".join(lines), scope)
    sample = result.samples[0]
    assert sample["prompt"] in scope["printed"] and sample["after"] != sample["before"]
    assert scope["printed"].strip().endswith(sample["after"]) and sample["after"]


def test_memory_can_be_saved_without_changing_the_loss(world: Path, model: Path, plain: Result) -> None:
    saved, _ = run(world, model, form(world, "pairs"), training__gradient_checkpointing=True)
    assert saved.after["loss"] == pytest.approx(plain.after["loss"], rel=1e-4)
    half, _ = run(world, model, form(world, "pairs"), dtype="bfloat16")
    assert half.after["loss"] == pytest.approx(plain.after["loss"], rel=0.2)


def test_samples_written_before_survive_an_interruption(world: Path, model: Path, plain: Result) -> None:
    from test_recipe_train import InterruptAt

    path = write_language_recipe(world, model, form(world, "pairs"))
    with InterruptAt(3):
        train(load_recipe(path), console=Console(quiet=True))
    result = train(load_recipe(path), console=Console(quiet=True), resume=True)
    assert result.samples == plain.samples and result.samples[0]["before"] is not None


# --- models in GGUF files ----------------------------------------------------------------------------------------


def test_a_gguf_file_trains_as_the_model_that_it_was_made_of(world: Path, model: Path, plain: Result) -> None:
    pytest.importorskip("gguf", reason="the extra `language` is not installed")
    file = save_as_gguf(model, world / "small.gguf")
    result, said = run(world, file, form(world, "pairs"))
    assert result.before["loss"] == pytest.approx(plain.before["loss"], rel=1e-4)
    assert result.after["loss"] == pytest.approx(plain.after["loss"], rel=1e-2)
    assert "quantization_config" not in json.loads((result.folder / "config.json").read_text())
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(file)
    lines = [line.removeprefix("  ") for line in said.partition("In Python:\n")[2].splitlines()]
    exec("\n".join(lines), {"print": lambda text: None})


def test_a_missing_gguf_file_is_not_looked_for_on_the_hub(world: Path) -> None:
    with pytest.raises(RecipeError, match="model: there is no file or folder 'models/small.gguf'"):
        load_recipe(write_language_recipe(world, Path("models/small.gguf"), form(world, "pairs")))


def test_a_package_may_be_one_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.recipes.places import find_in_package

    (tmp_path / "small_model").mkdir()
    (tmp_path / "small_model" / "small.gguf").write_bytes(b"GGUF")
    about = tmp_path / "small_model-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
    (about / "RECORD").write_text("small_model/small.gguf,,\nsmall_model-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_in_package("pypi:small-model", "model") == tmp_path / "small_model" / "small.gguf"
