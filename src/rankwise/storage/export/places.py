"""Finds the weights in the files of a model folder by the JSON headers of its safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rankwise.storage.export.exported import IN_PYTHON

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """The place of a tensor in a model's files.

    Args:
        name: the tensor's name in the file.
        file: the file's name.
        dtype: safetensors' name of the dtype, such as ``"BF16"``.
        shape: the tensor's shape.
        start: the position of its first byte in the file.
        size: its size in bytes.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def flat(self) -> tuple[int, int]:
        """The rows and columns of the tensor as a matrix: its first dimension, and the product of the others."""
        return self.shape[0], math.prod(self.shape[1:])

    def matrix(self, number: int) -> Place:
        """The place of one matrix in a stack; of the tensor itself if it is a matrix."""
        if len(self.shape) == 2:
            return self
        size = self.size // self.shape[0]
        return replace(self, shape=self.shape[1:], start=self.start + number * size, size=size)


def read_places(folder: Path) -> dict[str, Place]:
    """The places of all tensors in a model folder, by name.

    Raises:
        ValueError: the folder has no safetensors files.
    """
    index = folder / _INDEX
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no .safetensors files, in which merging finds its weights. {IN_PYTHON}"
        )
    places: dict[str, Place] = {}
    for file in files:
        with open(folder / file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                places[name] = Place(name, file, entry["dtype"], shape, 8 + size + start, end - start)
    return places


def same_weight(names: Iterable[str], name: str) -> str | None:
    """The only one of ``names`` that equals ``name`` up to a prefix, as between a model's body and the whole model."""
    names = list(names)
    if name in names:
        return name
    found = [each for each in names if each.endswith(f".{name}") or name.endswith(f".{each}")]
    return found[0] if len(found) == 1 else None
