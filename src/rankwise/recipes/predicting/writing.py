"""Predicting with a language model: it completes prompts, answers chats, or continues texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.recipes.models import token_limit
from rankwise.recipes.predicting.job import Job
from rankwise.recipes.tasks.causal_lm.language import prompt_ids

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
    prompts = [_prompt(recipe, tokenizer, values[row])[-room:] for row in rows]
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


def _prompt(recipe: Any, tokenizer: Any, value: Any) -> list[int]:
    """The tokens of a prompt. Those of a chat end where the assistant's last turn begins."""
    if not recipe.data.is_chat:
        return prompt_ids(tokenizer, value)
    turns: list[Mapping[str, str]] = (
        value if isinstance(value, list) else [{"role": "user", "content": value}]
    )
    if turns[-1]["role"] == "assistant" and len(turns) > 1:
        turns = turns[:-1]
    encoded = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the model's and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    return sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
