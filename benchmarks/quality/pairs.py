"""Pairs of words by heart: which of 32 words follows each of 200 pairs, with a Llama that first learnt to read reviews.

The Llama has 4 layers of width 128 and a vocabulary of 2,000 words. It is trained on the sentences of the reviews when
it is first asked for, which takes two minutes, and kept beside the results.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from readers import read_blocks
from sentences import read_reviews
from tasks import Batch, Sources, Task, placed, repeated
from torch import Tensor, nn
from torch.nn import functional as F

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FEWER = {0.25: _LINEAR[0:3:2], 0.5: _LINEAR[:4]}
_WORDS, _LENGTH = 2000, 32
_ANSWERS, _SIZE = 32, 32
_PAIRS_AND_STEPS = {"pairs": (200, 300), "pairs-long": (600, 3000)}
_READER = Path(__file__).with_name("reader.pt")


def _new() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_WORDS, hidden_size=128, intermediate_size=320, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.04,
        )
    )  # fmt: skip
    return model


def _blocks(sources: Sources) -> Tensor:
    """The reviews as the numbers of their words, (blocks, 32)."""
    texts = [re.findall(r"[a-z']+|[.,!?]|\d+", text.lower()) for text, _ in read_reviews(sources)]
    common = collections.Counter(word for text in texts for word in text).most_common(_WORDS - 1)
    numbers = {word: number for number, (word, _) in enumerate(common, 1)}
    ids = torch.tensor([numbers.get(word, 0) for text in texts for word in text])
    return ids[: len(ids) // _LENGTH * _LENGTH].view(-1, _LENGTH)


def reader(sources: Sources, steps: int = 2000) -> Path:
    """The file with the weights of the Llama, which is made if there is none."""
    return read_blocks(_new, lambda: _blocks(sources), _READER, steps)


def make(name: str, sources: Sources) -> Task:
    """``pairs`` or ``pairs-long``: told after four openings of two words, asked after a fifth."""
    count, steps = _PAIRS_AND_STEPS[name]
    weights = torch.load(reader(sources), weights_only=True)
    draw = torch.Generator().manual_seed(6)
    pairs = torch.unique(torch.randint(100, 800, (3 * count, 2), generator=draw), dim=0)
    pairs = pairs[torch.randperm(len(pairs), generator=draw)[:count]]
    answers = torch.randint(10, 10 + _ANSWERS, (count,), generator=draw)
    openings = torch.randint(1, 50, (5, 2), generator=draw)

    def batch(openings: Tensor, places: Tensor) -> Batch:
        return {"input_ids": torch.cat([openings, pairs[places]], 1), "labels": answers[places]}

    def load(seed: int) -> nn.Module:
        model = _new()
        model.load_state_dict(weights)
        return model

    def batches(seed: int) -> Iterator[Batch]:
        order = repeated(count, steps * _SIZE, lambda done: 1000 * seed + done)
        draw = torch.Generator().manual_seed(seed)
        for start in range(0, steps * _SIZE, _SIZE):
            told = torch.randint(0, 4, (_SIZE,), generator=draw)
            yield batch(openings[told], torch.tensor(order[start : start + _SIZE]))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        batch = placed(batch, model)
        logits = model(input_ids=batch["input_ids"], logits_to_keep=1).logits[:, -1]
        return F.cross_entropy(logits, batch["labels"])

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": float(loss(model, batch(openings[4:].expand(count, 2), torch.arange(count))))}

    return Task(name, steps, _LINEAR, [], load, batches, loss, evaluate, _FEWER)
