"""The next letter of texts in another language, with a Llama that first learnt to read movie reviews in English.

The Llama has 4 layers of width 128 and reads letter by letter. It is trained on the reviews when it is first asked for,
which takes some minutes, and kept beside the results.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from language import in_batches, next_token_loss, spread_out, texts_in
from readers import read_blocks
from sentences import read_reviews
from tasks import Sources, Task
from torch import Tensor, nn

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FEWER = {0.25: _LINEAR[0:3:2], 0.5: _LINEAR[:4]}
_LETTERS = "\n" + "".join(
    map(chr, range(32, 127))
)  # the number of a letter is its place; of all others it is 0
_LENGTH, _SIZE, _HELD_OUT = 64, 8, 128
_LANGUAGES_AND_STEPS = {
    "chichewa-letters": ("chichewa", 300),
    "indonesian-letters": ("indonesian", 300),
    "chichewa-letters-long": ("chichewa", 1800),
    "indonesian-letters-long": ("indonesian", 1800),
}
_READER = Path(__file__).with_name("letters.pt")


def _new() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(_LETTERS), hidden_size=128, intermediate_size=320, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=_LENGTH, tie_word_embeddings=True, initializer_range=0.04,
        )
    )  # fmt: skip
    return model


def _blocks(texts: Iterable[str], most: int | None = None) -> Tensor:
    """The letters of the first texts, at most so many, as numbers, (blocks, 64)."""
    numbers = {letter: number for number, letter in enumerate(_LETTERS)}
    joined = "\n".join(texts)[:most]
    ids = torch.tensor([numbers.get(letter, 0) for letter in joined])
    return ids[: len(ids) // _LENGTH * _LENGTH].view(-1, _LENGTH)


def reader(sources: Sources, steps: int = 3000) -> Path:
    """The file with the weights of the Llama, which is made if there is none."""
    return read_blocks(_new, lambda: _blocks(text for text, _ in read_reviews(sources)), _READER, steps)


def make(name: str, sources: Sources) -> Task:
    """The letters of one language; "-long" has six times as many steps. No letter is read twice."""
    language, steps = _LANGUAGES_AND_STEPS[name]
    weights = torch.load(reader(sources), weights_only=True)
    held_out, training = spread_out(_blocks(texts_in(language), most=1_000_000), _HELD_OUT)

    def load(seed: int) -> nn.Module:
        model = _new()
        model.load_state_dict(weights)
        return model

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": float(next_token_loss(model, {"input_ids": held_out, "labels": held_out}))}

    batches = in_batches(training, steps, _SIZE)
    return Task(name, steps, _LINEAR, [], load, batches, next_token_loss, evaluate, _FEWER)
