"""Invented names by heart, with MiniLM: which of eight groups each of 400 belongs to, which only training tells."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from sentences import FEWER, LINEAR, minilm
from tasks import Batch, Sources, Task, placed, repeated
from torch import Tensor, nn
from torch.nn import functional as F

_NAMES, _GROUPS, _STEPS, _SIZE = 400, 8, 300, 16
_TOLD = ("{} is here", "we met {}", "ask {} now", "{}")
_ASKED = "tell {} again"
_ONSETS, _VOWELS = "b d f g k l m n p r s t v z br dr kr st tr".split(), "aeiou"


def _invented(draw: random.Random) -> list[str]:
    """Names of three syllables, all different."""
    names: dict[str, None] = {}
    while len(names) < _NAMES:
        names["".join(draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(3))] = None
    return list(names)


def make(name: str, sources: Sources) -> Task:
    """``names``: told in four phrases, asked in a fifth."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    draw = random.Random(7)
    names = _invented(draw)
    groups = [draw.randrange(_GROUPS) for _ in names]
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    told = [
        (phrase.format(each), group) for each, group in zip(names, groups, strict=True) for phrase in _TOLD
    ]
    asked = [(_ASKED.format(each), group) for each, group in zip(names, groups, strict=True)]

    def batch(rows: Sequence[tuple[str, int]]) -> Batch:
        made = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
        return {**made, "labels": torch.tensor([group for _, group in rows])}

    def load(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=_GROUPS)
        return model

    def batches(seed: int) -> Iterator[Batch]:
        order = repeated(len(told), _STEPS * _SIZE, lambda done: 1000 * seed + done)
        for start in range(0, _STEPS * _SIZE, _SIZE):
            yield batch([told[place] for place in order[start : start + _SIZE]])

    def measured(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and the share that is right."""
        batch = placed(batch, model)
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        right = (logits.argmax(-1) == batch["labels"]).float().mean()
        return F.cross_entropy(logits, batch["labels"]), right

    def evaluate(model: nn.Module) -> dict[str, float]:
        loss, right = measured(model, batch(asked))
        return {"loss": float(loss), "accuracy": float(right)}

    return Task(
        name,
        _STEPS,
        LINEAR,
        ["classifier"],
        load,
        batches,
        lambda model, batch: measured(model, batch)[0],
        evaluate,
        FEWER,
    )
