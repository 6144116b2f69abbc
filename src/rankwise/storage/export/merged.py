"""A whole model folder with the updates added to the base weights, in the base's dtype.

Each file of weights is copied, and in the copy only the adapted weights are changed, some rows at a time: what it takes
of memory is the adapter and those rows, whatever the size of the model. That needs the places of tensors in the file,
which the safetensors library does not tell; its format has them in a JSON header, documented for such use.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rankwise.adapters.embedding import EmbeddingAdapters
from rankwise.files.atomic import write_folder
from rankwise.storage.export.base import base_path, read_base_config
from rankwise.storage.export.exported import IN_PYTHON, Exported
from rankwise.storage.updates import Update, Updates

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"
_NOT_COPIED = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".md")
_CONV1D = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")  # their weights are (d_in, d_out)
_AT_ONCE = 2**20  # numbers of a weight


@dataclass(frozen=True)
class _Place:
    """Where a tensor's numbers are: which file, from which byte on."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


def export_merged(folder: Path, updates: Updates, base: Path | None = None) -> Exported:
    """Write the base model's folder with the adapter merged into it.

    Args:
        folder: made if need be.
        updates: of the adapter.
        base: the base model's folder; None for where the adapter says that it is.

    Raises:
        FileNotFoundError: the base model is not there.
        ValueError: the base is quantized or of another kind of file, or lacks a weight that the adapter changes.
        OSError: it can't be written; what was there before is whole.
    """
    source = base_path(updates, base, "a merged model")
    config = read_base_config(source)
    if config.get("quantization_config"):
        raise ValueError(
            f"{source} is quantized, and merging would round its weights again. Name the model in half or full "
            "precision with `--base`."
        )
    places = _read_places(source)
    names = {path: _name_in(places, f"{path}.weight", updates, source) for path in updates.layers}
    whole = {
        _name_in(places, name.replace(".base_layer.", "."), updates, source): tensor
        for name, tensor in updates.others.items()
    }
    _check(updates, names, whole, places, config, source)

    def write(temporary: Path) -> None:
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(_NOT_COPIED) and not file.name.startswith("."):
                shutil.copyfile(file, temporary / file.name)
        for name, tensor in whole.items():
            with open(temporary / places[name].file, "r+b") as opened:
                opened.seek(places[name].start)
                opened.write(_bytes(tensor.to(_DTYPES[places[name].dtype])))
        for path, update in updates.layers.items():
            if update.rank:
                left, right = _factors(update, places[names[path]], config)
                with open(temporary / places[names[path]].file, "r+b") as opened:
                    _add(opened, places[names[path]], left, right)

    stale = [path.name for path in folder.glob("*.safetensors*")] if folder.is_dir() else []
    write_folder(folder, write, owned=stale)
    return Exported(folder, ("A model like any other: it needs no adapter.",))


def _read_places(folder: Path) -> dict[str, _Place]:
    """All tensors of a model folder by name."""
    index = folder / _INDEX
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no .safetensors files, in which merging finds its weights. {IN_PYTHON}"
        )
    places: dict[str, _Place] = {}
    for file in files:
        with open(folder / file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start = 8 + size + entry["data_offsets"][0]
                places[name] = _Place(file, entry["dtype"], tuple(entry["shape"]), start)
    return places


def _name_in(places: Mapping[str, _Place], name: str, updates: Updates, source: Path) -> str:
    """What the base's files call a parameter: they may have the model without its head, whose name comes first."""
    if name in places:
        return name
    found = [each for each in places if each.endswith(f".{name}") or name.endswith(f".{each}")]
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"{updates.source} changes {name!r}, which {source} does not hold: it is another model's, new (a head), or "
        f"shared with another weight. {IN_PYTHON}"
    )


def _check(
    updates: Updates,
    names: Mapping[str, str],
    whole: Mapping[str, Tensor],
    places: Mapping[str, _Place],
    config: Mapping[str, Any],
    source: Path,
) -> None:
    for path, update in updates.layers.items():
        place = places[names[path]]
        if update.grouped:
            raise ValueError(f"{path!r} is a grouped convolution, whose LoRA is no change of its weight.")
        if issubclass(update.kind, EmbeddingAdapters) and config.get("tie_word_embeddings"):
            raise ValueError(
                f"{updates.source} adapts the embedding {path!r}, which {source} shares with its output layer: merged, "
                "it would change both."
            )
        left, right = _factors(update, place, config)
        _check_place(names[path], place, (len(left), right.shape[1]), _flat(place.shape), updates, source)
    for name, tensor in whole.items():
        _check_place(name, places[name], tuple(tensor.shape), places[name].shape, updates, source)


def _check_place(
    name: str, place: _Place, wanted: tuple[int, ...], shape: tuple[int, ...], updates: Updates, source: Path
) -> None:
    if place.dtype not in _DTYPES:
        raise ValueError(f"{source}: {name} is {place.dtype}, into which nothing can be merged.")
    if wanted != shape:
        raise ValueError(
            f"{updates.source} changes {name} by {wanted}, but in {source} it is {place.shape}: it is not the base "
            "model that the adapter was trained on."
        )


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0], columns


def _factors(update: Update, place: _Place, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(rows, rank) and (rank, columns), whose product has the layout of the weight."""
    embedding = issubclass(update.kind, EmbeddingAdapters)
    conv1d = config.get("model_type") in _CONV1D and len(place.shape) == 2 and not embedding
    return (update.A.T, update.B.T) if embedding or conv1d else (update.B, update.A)


def _add(file: BinaryIO, place: _Place, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a weight in a file, some rows at a time, in single precision or better."""
    dtype = _DTYPES[place.dtype]
    rows, columns = _flat(place.shape)
    precise = torch.promote_types(torch.promote_types(dtype, left.dtype), torch.float32)
    at_once = max(1, _AT_ONCE // max(columns, 1))
    right = right.to(precise)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        file.seek(place.start + first * columns * dtype.itemsize)
        held = bytearray(file.read(count * columns * dtype.itemsize))
        weight = torch.frombuffer(held, dtype=dtype).view(count, columns)
        merged = torch.addmm(weight.to(precise), left[first : first + count].to(precise), right)
        file.seek(place.start + first * columns * dtype.itemsize)
        file.write(_bytes(merged.to(dtype)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
