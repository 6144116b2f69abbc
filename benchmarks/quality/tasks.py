"""What a task of the comparison is: a model, its training batches in a fixed order, and a measure on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sources:
    """Where what no Python package carries is found.

    Args:
        reviews: a CSV file of movie reviews with the columns "text" and "rating" (-4 to 4).
        snippets: the folder with VADER's ground truth (tweets_GroundTruth.txt and others).
        speech: a table that recipes/speech/make_data.py wrote.
        whisper: whisper-tiny.en, a name on the hub or a folder.
    """

    reviews: Path | None = None
    snippets: Path | None = None
    speech: Path | None = None
    whisper: str = "openai/whisper-tiny.en"


@dataclass(frozen=True)
class Task:
    """What a run needs.

    Args:
        name: of the task.
        steps: optimizer steps.
        targets: the layers that are adapted.
        fewer: for an average rank below 1, the layers that LoRA of rank 1 is left with, as is usual.
        heads: modules that are new, and train in full.
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
    fewer: Mapping[float, Sequence[str]] = field(default_factory=dict)


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below ``count`` in an order that depends on the seed alone."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def repeated(count: int, wanted: int, seed_after: Callable[[int], int]) -> list[int]:
    """The numbers below ``count``, all of them in a new order again and again, until there are ``wanted`` or more.

    Args:
        count: how many numbers.
        wanted: how long the list is at least.
        seed_after: the seed of the next order, by how many numbers there are already.
    """
    order: list[int] = []
    while len(order) < wanted:
        order += shuffled(count, seed_after(len(order)))
    return order


def placed(batch: Batch, model: Any) -> Batch:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}


def evaluated(task: Task, model: Any) -> dict[str, float]:
    """`Task.evaluate` in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return task.evaluate(model)
