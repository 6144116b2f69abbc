"""The export of a merged model: the base model's folder with the updates added to its weights, in the base's dtype.

Each file of weights is copied. In the copy, only the adapted weights are changed, some rows at a time. So the memory
needed is that of the adapter and those rows, whatever the size of the model. This requires the positions of tensors in
a file, which the safetensors library does not give. They are in the file's JSON header, whose format is documented.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rankwise.adapters.embedding import EmbeddingAdapters
from rankwise.attach.matching import saved_module_of
from rankwise.config import AdaLoraConfig
from rankwise.files.atomic import write_folder
from rankwise.files.tensors import is_finite
from rankwise.storage.export.base import base_path, read_base_config
from rankwise.storage.export.converted import Converted
from rankwise.storage.export.exported import IN_PYTHON, Exported, NotInBase, check_place_of_model
from rankwise.storage.export.places import DTYPES, Place, read_places, same_weight
from rankwise.storage.finite import refuse_overflow
from rankwise.storage.lora_layout import Update
from rankwise.storage.nesting import by_owner, named_by_targets
from rankwise.storage.updates import Updates

_NOT_COPIED = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".md")
_CONV1D = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")  # models whose weights are (d_in, d_out)
_AT_ONCE = 2**20  # numbers of a weight that are changed at once


@dataclass(frozen=True)
class _Change:
    """The change of a weight in a file: left (rows, rank) @ right (rank, columns) is added."""

    place: Place
    left: Tensor
    right: Tensor


def export_merged(folder: Path, updates: Updates, base: Path | None = None) -> Exported:
    """Write the base model's folder with the adapter merged into it.

    Args:
        folder: the folder to write. It is created if it does not exist.
        updates: the adapter's updates.
        base: the base model's folder. By default it is read from the adapter's configuration.

    Raises:
        FileNotFoundError: the base model does not exist.
        ValueError: the base model is quantized, has other kinds of files, or lacks a weight that the adapter changes;
            a weight would not be finite; or ``folder`` holds an adapter or the base model.
        OSError: the folder can't be written. Its previous contents are then unchanged.
    """
    source = base_path(updates, base, "a merged model")
    check_place_of_model(folder, source)
    config = read_base_config(source)
    if config.get("quantization_config"):
        raise ValueError(
            f"{source} is quantized, and merging would round its weights again. Name the model in half or full "
            "precision with `--base`."
        )
    weights = _Weights(source, config, updates)
    _refuse_shared(updates, weights)
    whole = [
        (weights.find(name.replace(".base_layer.", ".")), tensor) for name, tensor in updates.others.items()
    ]
    changes = [*_of_layers(updates, weights), *_of_stacks(updates, weights)]
    for place, tensor in whole:
        _check_place(place, tuple(tensor.shape), place.shape, updates, source)
    for change in changes:
        _check_place(
            change.place, (len(change.left), change.right.shape[1]), change.place.flat, updates, source
        )

    def write(temporary: Path) -> None:
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(_NOT_COPIED) and not file.name.startswith("."):
                shutil.copyfile(file, temporary / file.name)
        for place, tensor in whole:
            with open(temporary / place.file, "r+b") as opened:
                opened.seek(place.start)
                made = tensor.to(DTYPES[place.dtype])
                refuse_overflow(place.name, tensor, made)
                opened.write(_bytes(made))
        for change in changes:
            if change.right.shape[0]:
                with open(temporary / change.place.file, "r+b") as opened:
                    _add(opened, change)

    stale = [path.name for path in folder.glob("*.safetensors*")] if folder.is_dir() else []
    write_folder(folder, write, owned=stale)
    return Exported(folder, ("A model like any other: it needs no adapter.",))


class _Weights:
    """The weights of the base model, by the adapter's names for them."""

    def __init__(self, source: Path, config: Mapping[str, Any], updates: Updates) -> None:
        self.source, self.config, self.updates = source, config, updates
        self.places = read_places(source)

    @cached_property
    def converted(self) -> Converted:
        """The parameters as Transformers loads them. Importing it takes seconds."""
        return Converted(self.source, self.places)

    def find(self, name: str) -> Place:
        """The place of a parameter that the files store as one tensor."""
        found = same_weight(self.places, name)
        if found is not None:
            return self.places[found]
        try:
            place = self.converted.renamed(name)
        except ValueError:
            place = None  # the message below is still right
        if place is None:
            raise NotInBase(
                f"{self.updates.source} changes {name!r}, which {self.source} does not hold as one weight: it is "
                f"another model's, new (a head), stored together with others, or shared with another. {IN_PYTHON}"
            )
        return place

    def _holds(self, name: str) -> bool:
        try:
            return self.find(name) is not None
        except ValueError:
            return False

    def refuse_shared(self, path: str, name: str, embeds: bool = False) -> None:
        """Refuse to change the parameter ``name`` of the module at ``path`` if another module shares it."""
        try:
            shared = self.converted.sharing(name)
            output = self.converted.output_weight()
            # On loading, weights that the files lack are taken from the embedding, whatever the configuration says.
            if embeds and not shared and output is not None and not self._holds(output):
                shared = [output]
        except ValueError:  # without Transformers, only names and shapes tell
            shared = self._output_layer_like(name)
        if shared:
            whole = "trains" if name in self.updates.others else "adapts"
            raise ValueError(
                f"{self.updates.source} {whole} {path!r}, whose weight {self.source} shares with {shared[0]!r}: "
                "merged, it would change both. Load the adapter on top of the base model instead, or train on an "
                "untied base."
            )

    def _output_layer_like(self, name: str) -> list[str]:
        """The output layer, if it shares an embedding's weight, as in language models whose files lack that layer."""
        found = same_weight(self.places, name)
        shape = None if found is None else self.places[found].shape
        alike = [other for other, place in self.places.items() if other != found and place.shape == shape]
        kinds = self.config.get("architectures") or [""]
        writes = any(
            end in str(kinds[0]) for end in ("CausalLM", "LMHead", "ConditionalGeneration", "MaskedLM")
        )
        tied = self.config.get("tie_word_embeddings", writes and not alike)
        return ["the output layer"] if tied else []


def _refuse_shared(updates: Updates, weights: _Weights) -> None:
    """Refuse to change a weight that belongs to an embedding or a whole module and is shared with another module.

    Other kinds of layers may share a weight. They act as one layer that is called several times, and its update belongs
    to all calls.

    Raises:
        ValueError: the adapter changes a shared weight.
    """
    for path, update in updates.layers.items():
        if issubclass(update.kind, EmbeddingAdapters):
            weights.refuse_shared(path, f"{path}.weight", embeds=True)
    whole = updates.config.modules_to_save or ()
    for name, tensor in updates.others.items():
        owner = saved_module_of(name, whole, lambda path: True)
        if owner is not None and tensor.dim() == 2 and same_weight(weights.places, name) is not None:
            weights.refuse_shared(owner, name)


def _of_layers(updates: Updates, weights: _Weights) -> Iterator[_Change]:
    in_stacks = {name for names in updates.stacks.values() for name in names}
    for path, update in updates.layers.items():
        if path in in_stacks:
            continue
        if update.grouped:
            raise ValueError(f"{path!r} is a grouped convolution, whose LoRA is not a change of its weight.")
        place = weights.find(f"{path}.weight")
        yield _Change(place, *_factors(update, place, weights.config))


def _of_stacks(updates: Updates, weights: _Weights) -> Iterator[_Change]:
    """The changes of adapted parameters, such as experts: one for each matrix of a stack."""
    # LoRA's files tell a module's parameters apart only by their order.
    if not isinstance(updates.config, AdaLoraConfig):
        for owner in by_owner(updates.stacks):
            names = named_by_targets(updates.config.target_parameters or [])(owner)
            if not weights.converted.in_order([f"{owner}.{name}" for name in names]):
                raise ValueError(
                    f"{updates.source} distinguishes {' and '.join(names)} of {owner!r} by their order, which differs "
                    f"in the base model. {IN_PYTHON}"
                )
    for path, names in updates.stacks.items():
        transposed = weights.converted.is_transposed(path)
        if weights.converted.sharing(path):
            weights.refuse_shared(path, path)
        for number, name in enumerate(names):
            update = updates.layers[name]
            left, right = (update.A.T, update.B.T) if transposed else (update.B, update.A)
            for piece in weights.converted.pieces(path, number):
                yield _Change(piece.place, left[piece.first : piece.first + piece.place.shape[0]], right)


def _check_place(
    place: Place, wanted: tuple[int, ...], shape: tuple[int, ...], updates: Updates, source: Path
) -> None:
    if place.dtype not in DTYPES:
        raise ValueError(f"{source}: {place.name} is {place.dtype}, into which nothing can be merged.")
    if wanted != shape:
        raise ValueError(
            f"{updates.source} changes {place.name} by {wanted}, but in {source} it is {place.shape}: it is not the "
            "base model that the adapter was trained on."
        )


def _factors(update: Update, place: Place, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Factors (rows, rank) and (rank, columns), whose product has the layout of the weight."""
    embedding = issubclass(update.kind, EmbeddingAdapters)
    conv1d = config.get("model_type") in _CONV1D and len(place.shape) == 2 and not embedding
    return (update.A.T, update.B.T) if embedding or conv1d else (update.B, update.A)


def _add(file: BinaryIO, change: _Change) -> None:
    """Add to a weight in a file, some rows at a time, in single precision or better.

    Raises:
        ValueError: the sum is not finite, or out of range of the file's dtype.
    """
    place, left = change.place, change.left
    dtype = DTYPES[place.dtype]
    rows, columns = place.flat
    precise = torch.promote_types(torch.promote_types(dtype, left.dtype), torch.float32)
    at_once = max(1, _AT_ONCE // max(columns, 1))
    right = change.right.to(precise)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        file.seek(place.start + first * columns * dtype.itemsize)
        held = bytearray(file.read(count * columns * dtype.itemsize))
        weight = torch.frombuffer(held, dtype=dtype).view(count, columns)
        merged = torch.addmm(weight.to(precise), left[first : first + count].to(precise), right)
        made = merged.to(dtype)
        if not is_finite(made) and is_finite(weight):
            refuse_overflow(f"{place.name}, merged,", merged, made)
            raise ValueError(
                f"{place.name}, merged, holds NaN or infinite values: use an earlier checkpoint."
            )
        file.seek(place.start + first * columns * dtype.itemsize)
        file.write(_bytes(made))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
