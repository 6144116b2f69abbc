"""Reads the update that an adapter of any kind adds to each layer, as two factors, and writes updates as LoRA.

LoRA's update s * B A and the paper's s * B diag(E) A both become B A: the scale and E are multiplied into A. This is
exact, because no product B A is formed and nothing is approximated. When an update is written again, alpha equals the
rank, so that every layer's scale is 1.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.adapters import AdapterLayer
from rankwise.adapters.parameter import ParameterAdapters, stacked_columns
from rankwise.attach.attachment import adapter_layers, base_scaling
from rankwise.attach.matching import pattern_value
from rankwise.config import CONFIG_NAME, LoraConfig
from rankwise.files.atomic import write_folder
from rankwise.run.pairs import block_names
from rankwise.storage import OWNED, PREFIX, WEIGHTS_NAME, AdapterFile, read_adapter, read_model_adapter
from rankwise.storage.adapter_file import kept_by_pattern, matrices_of
from rankwise.storage.contents import named_by_use
from rankwise.storage.finite import near
from rankwise.storage.lora_layout import Update, in_file_order, lora_config, plain_lora

if TYPE_CHECKING:
    from rankwise.model import PeftModel


@dataclass(frozen=True)
class Updates:
    """The updates of an adapter, and its other tensors.

    Args:
        source: the adapter's origin, for messages.
        config: the adapter's configuration.
        layers: the update of each layer in the folder, by path. PEFT's AdaLoRA format includes layers at rank 0. Each
            matrix of a stack is a layer of its own, named with its index: ``"mlp.experts.up.3"``.
        others: biases and modules saved in full, by name in the file.
        stacks: the names of the matrices in each stack, such as experts, by the stack's path.
    """

    source: str
    config: LoraConfig
    layers: Mapping[str, Update]
    others: Mapping[str, Tensor]
    stacks: Mapping[str, list[str]] = field(default_factory=dict)


def read_updates(adapter: PeftModel | str | os.PathLike[str], adapter_name: str = "default") -> Updates:
    """Read the updates of an adapter on a model, or in a folder that rankwise or PEFT wrote.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a file is broken or does not fit the others. The message names it.
    """
    if isinstance(adapter, (str, os.PathLike)):
        file, own = read_adapter(Path(adapter)), {}
    else:
        file, own = read_model_adapter(adapter, adapter_name), adapter_layers(adapter, adapter_name)
    layers: dict[str, Update] = {}
    stacks: dict[str, list[str]] = {}
    for path in sorted(file.factors, key=_in_order):
        matrices = matrices_of(file, path)
        found = [_update(file, path, own.get(path))] if matrices is None else _unstacked(file, path, matrices)
        if matrices is None:
            layers[path] = found[0]
        else:
            stacks[path] = block_names(path, matrices)
            layers |= zip(stacks[path], found, strict=True)
    return Updates(file.source, file.config, layers, file.others, stacks)


def acting(updates: Updates) -> dict[str, Update]:
    """The updates of the layers with a rank of at least 1.

    Raises:
        ValueError: all layers have rank 0.
    """
    layers = {path: update for path, update in updates.layers.items() if update.rank}
    if not layers:
        raise ValueError(f"{updates.source} has rank 0 in all layers, so there is nothing to export.")
    return layers


def write_lora(
    folder: Path,
    updates: Updates,
    layers: Mapping[str, Update],
    dtype: torch.dtype | None = None,
    companions: Iterable[Path] = (),
) -> LoraConfig:
    """Write ``layers`` as a plain LoRA adapter, with everything else taken from ``updates``. Writing is atomic.

    Args:
        folder: the folder to write. It is created if it does not exist; an adapter in it is replaced.
        updates: the updates that ``layers`` were made from.
        layers: updates of rank 1 or more. Layers of ``updates`` that are missing here are not adapted.
        dtype: the dtype of the written factors; by default they keep their own.
        companions: files to copy into the folder.

    Returns:
        The configuration that was written: ``lora_alpha`` equals the rank in every layer.

    Raises:
        OSError: the folder can't be written. Its previous contents are then unchanged.
        ValueError: factors hold NaN or infinite values, or numbers that ``dtype`` can't hold. Nothing is written then.
    """
    plain = {path: update for path, update in layers.items() if path not in _in_stacks(updates)}
    stacks = {}
    for path in in_file_order(updates.config, updates.stacks):
        names = updates.stacks[path]
        if any(name in layers for name in names):
            stacks[path] = [layers.get(name, updates.layers[name].cut(0)) for name in names]
    left_out = _all_paths(updates) - plain.keys() - stacks.keys()
    config, factors = plain_lora(updates.config, plain, stacks, left_out, dtype=dtype)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in updates.others.items()}
    write_lora_folder(folder, config, named_by_use({**tensors, **factors}), companions)
    return config


def write_lora_folder(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], companions: Iterable[Path] = ()
) -> None:
    """Write a configuration and tensors under PEFT's names as an adapter folder, atomically.

    Raises:
        OSError: the folder can't be written. Its previous contents are then unchanged.
        ValueError: a tensor holds NaN.
    """
    for name, tensor in tensors.items():  # factors have been checked already
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError(f"{name.removeprefix(PREFIX)!r} holds NaN: use an earlier checkpoint.")

    def write(temporary: Path) -> None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / WEIGHTS_NAME,
                  metadata={"format": "pt"})  # fmt: skip
        config.save_pretrained(temporary)
        for file in companions:
            shutil.copyfile(file, temporary / file.name)

    write_folder(folder, write, owned=OWNED)


def padded_config(updates: Updates, layers: Iterable[str], rank: int) -> LoraConfig:
    """Build the configuration of LoRA layers with one rank and an equal alpha, so that the scale is 1.

    Raises:
        ValueError: a layer is a matrix of a stack. A LoRA file holds stacks only as a whole.
    """
    layers = list(layers)
    inner = next((path for path in layers if path in _in_stacks(updates)), None)
    if inner is not None:
        raise ValueError(
            f"{updates.source} adapts experts ({inner!r}), for which this format has no place. `save_as_lora` without "
            "`pad` writes a folder that PEFT reads; or export the merged model (`--to merged`), and serve that."
        )
    return lora_config(
        updates.config, dict.fromkeys(layers, (rank, 1.0)), left_out=_all_paths(updates) - set(layers)
    )


def _in_stacks(updates: Updates) -> set[str]:
    """The names of the matrices of all stacks."""
    return {name for names in updates.stacks.values() for name in names}


def _all_paths(updates: Updates) -> set[str]:
    """The paths of all layers and parameters that the adapter adapts."""
    return (updates.layers.keys() - _in_stacks(updates)) | updates.stacks.keys()


def _unstacked(file: AdapterFile, path: str, matrices: int) -> list[Update]:
    """The update of each matrix of a stack."""
    config, own = file.config, file.factors[path]
    A, B = own["A"], own["B"]
    if "E" in own:
        A = _scaled(A, own["E"] * base_scaling(config, path, config.init_r))  # type: ignore[attr-defined]
        kept = torch.tensor(kept_by_pattern(config).get(path, [True] * len(A)), device="cpu").view(
            matrices, -1
        )
        counts = kept.sum(1).tolist()
    else:
        rank = pattern_value(config.rank_pattern or {}, path, config.r)
        A, B = _scaled(A, base_scaling(config, path, rank)), stacked_columns(B, matrices)
        counts = [rank] * matrices
    parts = zip(A.split(counts), B.split(counts, dim=1), strict=True)
    return [Update(one_A, one_B, ParameterAdapters) for one_A, one_B in parts]


def _in_order(path: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10; a file has layer 10 right after layer 1."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _update(file: AdapterFile, path: str, layer: AdapterLayer | None) -> Update:
    config, kind, own = file.config, file.kinds[path], file.factors[path]
    # The kernel of a convolution is known from the layer, or from the shape in a file of plain LoRA.
    kernel = getattr(layer, "kernel_size", tuple(own["A"].shape[2:]))
    A, B = own["A"].flatten(1), own["B"].flatten(1)
    if "E" in own:
        A = _scaled(A, own["E"] * base_scaling(config, path, config.init_r))  # type: ignore[attr-defined]
        A, B = (A, B) if layer is None else layer.as_lora(layer, A, B)
        return Update(A, B, kind, kernel)
    rank = pattern_value(config.rank_pattern or {}, path, config.r)
    grouped = kernel and B.shape[1] and rank % B.shape[1] == 0
    if A.shape[0] != rank or (B.shape[1] != rank and not grouped):
        raise ValueError(
            f"{file.source}: {path!r} should have rank {rank} by `r` and `rank_pattern` of {CONFIG_NAME}, but its "
            f"factors are {tuple(own['A'].shape)} and {tuple(own['B'].shape)}. One of the files is another adapter's."
        )
    return Update(_scaled(A, base_scaling(config, path, rank)), B, kind, kernel)


def _scaled(A: Tensor, by: Tensor | float) -> Tensor:
    """``A * by``, in float32 if half precision can't hold it."""
    return near(A.to(torch.promote_types(A.dtype, torch.float32)) * by, A.dtype)
