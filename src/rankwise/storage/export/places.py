"""Where the files of a model folder hold its weights, from the JSON headers of its safetensors files."""

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
    """Where a tensor's numbers are.

    Args:
        name: what the file calls it.
        file: which file.
        dtype: as safetensors calls it, such as ``"BF16"``.
        shape: of the tensor.
        start: its first byte in the file.
        size: how many bytes it has.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def flat(self) -> tuple[int, int]:
        """Rows and columns: the first dimension, and all others."""
        return self.shape[0], math.prod(self.shape[1:])

    def matrix(self, number: int) -> Place:
        """One of the matrices that are stacked in it; itself, if it is one."""
        if len(self.shape) == 2:
            return self
        size = self.size // self.shape[0]
        return replace(self, shape=self.shape[1:], start=self.start + number * size, size=size)


def read_places(folder: Path) -> dict[str, Place]:
    """All tensors of a model folder, by their names in the files.

    Raises:
        ValueError: it has no safetensors files.
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
    """The one of ``names`` that is ``name``, or is it once a prefix is taken from either: a body has no head's."""
    names = list(names)
    if name in names:
        return name
    found = [each for each in names if each.endswith(f".{name}") or name.endswith(f".{each}")]
    return found[0] if len(found) == 1 else None
