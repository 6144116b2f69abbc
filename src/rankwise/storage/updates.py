"""What an adapter adds to each layer, as two factors, whatever kind of adapter it is; and writing that as LoRA.

AdaLoRA's update s * B diag(E) A and LoRA's s * B A both become B A, with scale and E multiplied into A. This is exact:
no product is formed and nothing is approximated. Written again with alpha equal to the rank, every layer's scale is 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.adapters import AdapterLayer
from rankwise.attach.attachment import adapter_layers, base_scaling
from rankwise.attach.matching import pattern_value
from rankwise.config import CONFIG_NAME, AdaLoraConfig, LoraConfig
from rankwise.files.atomic import write_folder
from rankwise.storage import OWNED, PREFIX, WEIGHTS_NAME, AdapterFile, read_adapter, read_model_adapter

if TYPE_CHECKING:
    from rankwise.model import PeftModel

_KEPT_EXTRA = ("auto_mapping",)  # says which class the base model has


@dataclass(frozen=True)
class Update:
    """The change B A of one layer's weight.

    Args:
        A: (rank, d_in), with the scale and AdaLoRA's E in it.
        B: (d_out, rank), or (d_out, rank / groups) for a grouped convolution in LoRA's layout.
        kind: of layer, which knows how a file names the factors. An embedding has d_in entries.
        kernel: height and width of a convolution, whose d_in is channels * height * width.
    """

    A: Tensor
    B: Tensor
    kind: type[AdapterLayer]
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]

    @property
    def width(self) -> int:
        """Numbers that one more rank takes: d_in + d_out."""
        return self.A.shape[1] + self.B.shape[0]

    @property
    def parameters(self) -> int:
        """Numbers in A and B."""
        return self.A.numel() + self.B.numel()

    @property
    def grouped(self) -> bool:
        """Whether it is a grouped convolution's in LoRA's layout, which is no change B A of a weight."""
        return self.B.shape[1] != self.rank


@dataclass(frozen=True)
class Updates:
    """All that an adapter adds to a model.

    Args:
        source: where it comes from, for messages.
        config: the adapter's configuration.
        layers: the update of each layer by its path, those at rank 0 included.
        others: biases and modules saved whole, by their names in the file.
    """

    source: str
    config: LoraConfig
    layers: Mapping[str, Update]
    others: Mapping[str, Tensor]


def read_updates(adapter: PeftModel | str | os.PathLike[str], adapter_name: str = "default") -> Updates:
    """The updates of an adapter on a model, or in a folder that rankwise or PEFT wrote.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file is broken or does not fit the others; the message names it.
    """
    if isinstance(adapter, (str, os.PathLike)):
        file, own = read_adapter(Path(adapter)), {}
    else:
        file, own = read_model_adapter(adapter, adapter_name), adapter_layers(adapter, adapter_name)
    factors = sorted(file.factors.items(), key=_in_order)
    layers = {path: _update(file, path, tensors, own.get(path)) for path, tensors in factors}
    return Updates(file.source, file.config, layers, file.others)


def acting(updates: Updates) -> dict[str, Update]:
    """The updates of the layers that have a rank.

    Raises:
        ValueError: none has.
    """
    layers = {path: update for path, update in updates.layers.items() if update.rank}
    if not layers:
        raise ValueError(f"{updates.source} has rank 0 in all layers, so there is nothing to export.")
    return layers


def write_lora(
    folder: Path, updates: Updates, layers: Mapping[str, Update], dtype: torch.dtype | None = None
) -> LoraConfig:
    """Write ``layers`` as a plain LoRA adapter, with all else as in ``updates``, all or nothing.

    Args:
        folder: made if need be; an adapter in it is replaced.
        updates: what ``layers`` were made from.
        layers: updates of ranks from 1; a layer of ``updates`` that is not among them is no target.
        dtype: of the written factors; as they are if None.

    Returns:
        The configuration that was written: ``lora_alpha`` equals the rank in every layer.

    Raises:
        OSError: it can't be written; what was there before is whole.
    """
    config = lora_config(updates, {path: update.rank for path, update in layers.items()})
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in updates.others.items()}
    for path, update in layers.items():
        tensors |= named_tensors(path, update, dtype)
    write_lora_folder(folder, config, tensors)
    return config


def write_lora_folder(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a configuration and tensors under PEFT's names as an adapter folder, all or nothing."""

    def write(temporary: Path) -> None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / WEIGHTS_NAME,
                  metadata={"format": "pt"})  # fmt: skip
        config.save_pretrained(temporary)

    write_folder(folder, write, owned=OWNED)


def lora_config(updates: Updates, ranks: Mapping[str, int]) -> LoraConfig:
    """A configuration of LoRA layers of these ranks, with rank and alpha equal, so that the scale is 1 everywhere."""
    config, top = updates.config, max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != top}
    every_layer_is_left = len(ranks) == len(updates.layers)
    return LoraConfig(
        r=top,
        lora_alpha=top,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=config.target_modules if every_layer_is_left else list(ranks),
        exclude_modules=config.exclude_modules if every_layer_is_left else None,
        layers_to_transform=config.layers_to_transform if every_layer_is_left else None,
        layers_pattern=config.layers_pattern if every_layer_is_left else None,
        bias=config.bias,
        fan_in_fan_out=config.fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        extra={name: config.extra[name] for name in _KEPT_EXTRA if name in config.extra},
    )


def named_tensors(path: str, update: Update, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A layer's factors under PEFT's names and in PEFT's shapes."""
    A, B = update.A.to(dtype or update.A.dtype), update.B.to(dtype or update.B.dtype)
    if update.kernel:
        A, B = A.view(len(A), -1, *update.kernel), B[:, :, None, None]
    return {
        PREFIX + update.kind.file_name(path, name, adalora=False): each for name, each in (("A", A), ("B", B))
    }


def _in_order(named: tuple[str, Any]) -> list[tuple[int, str]]:
    """Layer 2 before layer 10, which a file has after layer 1."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in named[0].split(".")]


def _update(file: AdapterFile, path: str, own: Mapping[str, Tensor], layer: AdapterLayer | None) -> Update:
    config, kind = file.config, file.kinds[path]
    # Of a convolution: the layer knows it, or plain LoRA's file has it in the shape.
    kernel = getattr(layer, "kernel_size", tuple(own["A"].shape[2:]))
    A, B = own["A"].flatten(1), own["B"].flatten(1)
    if isinstance(config, AdaLoraConfig):
        A = A * (own["E"] * base_scaling(config, path, config.init_r))
        A, B = (A, B) if layer is None else layer.as_lora(A, B)
        return Update(A, B, kind, kernel)
    rank = pattern_value(config.rank_pattern or {}, path, config.r)
    grouped = kernel and B.shape[1] and rank % B.shape[1] == 0
    if A.shape[0] != rank or (B.shape[1] != rank and not grouped):
        raise ValueError(
            f"{file.source}: {path!r} should have rank {rank} by `r` and `rank_pattern` of {CONFIG_NAME}, but its "
            f"factors are {tuple(own['A'].shape)} and {tuple(own['B'].shape)}. One of the files is another adapter's."
        )
    return Update(A * base_scaling(config, path, rank), B, kind, kernel)
