"""Splitting prompts with completions, chats and plain texts into tokens, and measuring perplexity.

A prompt is split apart from its completion, as it is when the model is used. TRL's ``SFTTrainer`` splits both together,
and drops rows without naming them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.recipes.data.labels import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

Message = Mapping[str, str]


@dataclass(frozen=True)
class Encoded:
    """The tokens of an example.

    Args:
        ids: the tokens' numbers.
        answer: whether the model should write the token, for each token.
        is_cut: whether tokens were cut off.
    """

    ids: list[int]
    answer: list[bool]
    is_cut: bool = False

    def labels(self, answers_only: bool) -> list[int]:
        """The labels: the token's number where there is a loss, `IGNORED` elsewhere."""
        return [
            token if mine or not answers_only else IGNORED
            for token, mine in zip(self.ids, self.answer, strict=True)
        ]


def encode_completion(tokenizer: Any, prompt: str, completion: str, limit: int) -> Encoded:
    """Split a prompt and its completion into tokens, each by itself, as when the model is used.

    An example that is too long loses the beginning of its prompt, and the completion stays whole. Only a completion
    that is too long by itself loses its end.
    """
    before = prompt_ids(tokenizer, prompt)
    after = [*tokenizer(completion, add_special_tokens=False)["input_ids"], *_end(tokenizer)]
    is_cut = len(before) + len(after) > limit
    if is_cut:
        before = end_of_prompt(tokenizer, before, limit - len(after))
        after = after[: limit - len(before)]
    return Encoded(before + after, [False] * len(before) + [True] * len(after), is_cut)


def encode_text(tokenizer: Any, text: str, limit: int | None = None) -> Encoded:
    """Split a text into tokens, and add the token that ends it. A text that is too long loses its end."""
    ids = [*prompt_ids(tokenizer, text), *_end(tokenizer)]
    kept = ids[:limit]
    return Encoded(kept, [True] * len(kept), len(kept) < len(ids))


def encode_chat(tokenizer: Any, messages: Sequence[Message], limit: int, answers_only: bool) -> Encoded:
    """Split a chat into tokens with the tokenizer's chat template. A chat that is too long loses its end.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: the turns, each with its role and content.
        limit: the most tokens to keep.
        answers_only: whether to find the assistant's turns. They are found by the template's ``{% generation %}`` marks
            or, without marks, by the text that each turn adds to the chat before it.

    Raises:
        ValueError: the template can't render the chat, or changes earlier turns when one is added.
    """
    if answers_only and not marks_answers(tokenizer):
        ids, answer = _answers_by_prefix(tokenizer, messages)
    elif answers_only:
        encoded = tokenizer.apply_chat_template(
            list(messages), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, answer = encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]
    else:
        ids = tokenizer.apply_chat_template(list(messages), return_dict=True)["input_ids"]
        answer = [True] * len(ids)
    return Encoded(list(ids[:limit]), answer[:limit], len(ids) > limit)


def marks_answers(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template marks the assistant's turns."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) is not None


def _answers_by_prefix(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and for each token whether it begins in text that an assistant's turn adds."""
    text = _rendered(tokenizer, messages)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto = _rendered(tokenizer, messages[: turn + 1])
        before = (
            _rendered(tokenizer, messages[:turn], add_generation_prompt=True)
            if turn
            else _before_first_answer(tokenizer, upto)
        )
        if not (upto.startswith(before) and text.startswith(upto)):
            raise ValueError(
                "the chat template changes earlier turns when one is added, so that the assistant's can't be told "
                "from the others. Say data.loss_on: all, or use a template with {% generation %}"
            )
        # The model writes nothing after the token that ends a turn, so a line break there is not learned.
        whole = upto.rstrip()
        spans.append((len(before), len(whole if whole.endswith(_specials(tokenizer)) else upto)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    answer = [any(first <= start < last for first, last in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], answer


def _before_first_answer(tokenizer: Any, first: str) -> str:
    """The beginning of a chat's first turn, which is the assistant's, up to his words.

    Templates can't render a chat without turns, so the text that announces an answer is taken from another chat.
    """
    asked = [{"role": "user", "content": "?"}]
    announced = _rendered(tokenizer, asked, add_generation_prompt=True)[len(_rendered(tokenizer, asked)) :]
    head, found, _ = first.partition(announced) if announced else ("", "", "")
    return head + found if found else ""


def _rendered(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def _specials(tokenizer: Any) -> tuple[str, ...]:
    return tuple(tokenizer.all_special_tokens)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a text to continue: with the beginning token, if the model has one, but without the end token."""
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def end_of_prompt(tokenizer: Any, ids: Sequence[int], room: int) -> list[int]:
    """The last ``room`` tokens of a prompt, at least 1. The token that begins a text stays."""
    ids = list(ids)
    if len(ids) <= room:
        return ids
    first = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return first + ids[len(ids) - max(room, 1) + len(first) :]


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def pack(texts: Iterable[Sequence[int]], length: int) -> Iterator[list[int]]:
    """Join all texts, and cut them into blocks. The last block may be shorter, but has at least two tokens.

    Args:
        texts: the tokens of each text, with the end token.
        length: the number of tokens of a block.

    Example:
        >>> list(pack([[1, 2, 3, 0], [4, 5, 0], [6, 0]], length=4))
        [[1, 2, 3, 0], [4, 5, 0, 6]]
    """
    block: list[int] = []
    for text in texts:
        block.extend(text)
        while len(block) >= length:
            yield block[:length]
            block = block[length:]
    if len(block) > 1:
        yield block


# --- perplexity --------------------------------------------------------------------------------------------------


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """The summed loss and the number of learned tokens of each example. An evaluation keeps nothing else.

    Args:
        logits: the logits, shape (batch, length, vocabulary), or a tuple that begins with them.
        labels: the labels, shape (batch, length), with `IGNORED` where there is no loss.

    Returns:
        The sums and the numbers, shape (batch, 2), float32.
    """
    import torch
    from torch.nn.functional import cross_entropy

    logits = logits[0] if isinstance(logits, tuple) else logits
    # One example at a time, because a batch of logits in float32 may take gigabytes.
    sums = [
        cross_entropy(each[:-1].float(), label[1:], ignore_index=IGNORED, reduction="sum")
        for each, label in zip(logits, labels, strict=True)
    ]
    counts = (labels[:, 1:] != IGNORED).sum(dim=1)
    return torch.stack([torch.stack(sums), counts.float()], dim=1)


def perplexity_metrics(prediction: Any) -> dict[str, float]:
    """The loss per token and the perplexity over all held-out tokens.

    Every token counts the same, however long its example is. A perplexity too large for a float is infinite.

    Args:
        prediction: the trainer's prediction, whose ``predictions`` are those of `token_losses`, shape (n, 2).

    Example:
        >>> from types import SimpleNamespace
        >>> import numpy
        >>> perplexity_metrics(SimpleNamespace(predictions=numpy.array([[0.0, 1.0], [3 * math.log(2), 2.0]])))
        {'token_loss': 0.6931471805599453, 'perplexity': 2.0}
    """
    import numpy as np

    total, count = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    loss = float(total / count)
    try:
        return {"token_loss": loss, "perplexity": math.exp(loss)}
    except OverflowError:
        return {"token_loss": loss, "perplexity": math.inf}


# --- samples -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """The prompt of a sample.

    Args:
        text: the text to show.
        ids: the tokens for the model.
        expected: the continuation in the held-out example. None: the prompt is not from an example.
    """

    text: str
    ids: Sequence[int]
    expected: str | None = None


def write_on(model: Any, tokenizer: Any, prompt: Prompt, tokens: int) -> str:
    """The text that a model writes after a prompt. Each token is the likeliest one.

    Args:
        model: a language model.
        tokenizer: the model's tokenizer.
        prompt: the prompt.
        tokens: the most tokens to write.
    """
    import torch

    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    ids = torch.tensor([list(prompt.ids)], device=model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            eos_token_id=sorted(ends) or None, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    model.train(was_training)
    return str(tokenizer.decode(written[0, len(prompt.ids) :], skip_special_tokens=True)).strip()
