"""Predicting with a language model: it completes prompts, answers chats, or continues texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.recipes.data.rows import bad_rows
from rankwise.recipes.errors import raise_problems
from rankwise.recipes.models import token_limit
from rankwise.recipes.predicting.job import Job
from rankwise.recipes.tasks.causal_lm.examples import chat_problem, template_error, turn
from rankwise.recipes.tasks.causal_lm.language import end_of_prompt, prompt_ids

_LENGTH = 1024


def columns(recipe: Any) -> dict[str, str]:
    """The name of the column to read, by its key in the recipe."""
    return {key: name for key, name in recipe.data.columns.items() if key != "data.completion"}


def predict(job: Job) -> list[dict[str, Any] | None]:
    """The text that the model writes for each row. Each token is the likeliest one."""
    recipe, tokenizer = job.recipe, job.processor
    (column,) = columns(recipe).values()
    values = job.table.rows[column]
    if recipe.data.messages is not None:
        rows = [row for row, turns in enumerate(values) if turns]
        job.note_skipped(
            [row for row, turns in enumerate(values) if not turns], f"without messages in {column!r}"
        )
    else:
        rows = job.usable_texts(column)
    tokens = job.max_new_tokens or recipe.sample_tokens
    limit = token_limit(recipe.data.max_length, tokenizer, job.model.config, _LENGTH)
    room = max(1, limit - tokens)
    whole = _prompts(job, rows, values, column)
    prompts = [end_of_prompt(tokenizer, ids, room) for ids in whole]
    cut = sum(len(ids) > room for ids in whole)
    if cut:
        job.notes.append(
            f"{cut:,} of {len(rows):,} prompts are longer than {room:,} tokens; the beginning of each is not read."
        )
    ends = _ends(job.model, tokenizer)

    def of_batch(batch: list[list[int]]) -> Sequence[dict[str, Any]]:
        # Padding is on the left, so that the new tokens follow the prompt.
        inputs = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(
            job.model.device
        )
        written = job.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=tokens,
            do_sample=False, eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        after = written[:, inputs["input_ids"].shape[1] :]
        return [{"": text.strip()} for text in tokenizer.batch_decode(after, skip_special_tokens=True)]

    return job.spread(rows, job.run(prompts, [len(ids) for ids in prompts], of_batch))


def _prompts(job: Job, rows: Sequence[int], values: Sequence[Any], column: str) -> list[list[int]]:
    """The tokens of each prompt. Those of a chat end where the assistant's last turn begins."""
    data, tokenizer = job.recipe.data, job.processor
    if not data.is_chat:
        return [prompt_ids(tokenizer, values[row]) for row in rows]
    prompts, wrong = [], {}
    for row in rows:
        turns = [turn("user", values[row])] if data.messages is None else _asked(values[row])
        problem = chat_problem(turns)
        if problem is not None:
            wrong[row] = f"{column!r}: {problem}"
            continue
        read = [turn(each["role"], each["content"]) for each in turns]
        try:
            encoded = tokenizer.apply_chat_template(read, add_generation_prompt=True, return_dict=True)
            prompts.append(list(encoded["input_ids"]))
        except (ValueError, template_error()) as error:
            wrong[row] = f"can't be rendered: {error}"
    key = "data.messages" if data.messages is not None else "data.chat"
    raise_problems(bad_rows(key, job.table, list(wrong), wrong.__getitem__))
    return prompts


def _asked(turns: Any) -> Any:
    """A chat without the answer at its end."""
    last = turns[-1] if isinstance(turns, list) and len(turns) > 1 else None
    answered = isinstance(last, Mapping) and last.get("role") == "assistant"
    return turns[:-1] if answered else turns


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the model's and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    return sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
