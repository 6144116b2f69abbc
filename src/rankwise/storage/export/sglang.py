"""The export for SGLang and LoRAX, by the source of their main branches in 2026.

Both scale every layer by ``lora_alpha / r`` and stack the layers of a kind, so every tensor must have rank ``r``.
SGLang joins q, k and v of a layer, and gate and up. If it finds one of them, it expects the others. LoRAX drops a kind
of projection from all layers if it is missing in one layer. The export therefore gives all layers one rank, and missing
layers get factors of zeros, which change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.storage.export.base import BaseShape
from rankwise.storage.export.exported import (
    Exported,
    base_in_command,
    refuse_convolutions,
    refuse_whole_tensors,
)
from rankwise.storage.export.padding import padded
from rankwise.storage.lora_layout import Update, named_tensors
from rankwise.storage.updates import Updates, padded_config, write_lora_folder

_LAYER = re.compile(r"(.+\.)(\d+)(\..+)")
_SERVER = "SGLang"


def export_for_sglang(
    folder: Path, updates: Updates, dtype: torch.dtype | None = None, base: BaseShape | None = None
) -> Exported:
    """Write a folder that SGLang and LoRAX load.

    Args:
        folder: the folder to write. It is created if it does not exist.
        updates: the adapter's updates.
        dtype: the dtype of the written factors; by default they keep their own.
        base: the base model's shape, if it is known: the number of layers and the widths of q and v are used.

    Raises:
        ValueError: the adapter holds something that SGLang cannot load, or lacks something that only ``base`` can add.
        OSError: the folder can't be written. Its previous contents are then unchanged.
    """
    refuse_whole_tensors(updates, _SERVER)
    layers = padded(updates)
    refuse_convolutions(updates, layers, _SERVER)
    layers = _with_companions(_with_all_layers(layers, base), updates, base)
    rank = next(iter(layers.values())).rank
    config = padded_config(updates, layers, rank)
    config.target_modules = sorted({path.rpartition(".")[2] for path in layers})
    tensors: dict[str, Tensor] = {}
    for path, update in layers.items():
        tensors |= named_tensors(path, update, dtype)
    write_lora_folder(folder, config, tensors)
    names = " ".join(config.target_modules)
    return Exported(
        folder,
        (
            f"python -m sglang.launch_server --model-path {base_in_command(updates)} --enable-lora "
            f"--lora-paths NAME={folder} --max-lora-rank {rank} --lora-target-modules {names}",
        ),
    )


def _with_all_layers(layers: Mapping[str, Update], base: BaseShape | None) -> dict[str, Update]:
    """Add zeros for projections that are adapted in some layers, but not in all."""
    numbered = {path: match for path in layers if (match := _LAYER.fullmatch(path))}
    count = base.layers if base else 1 + max((int(match[2]) for match in numbered.values()), default=-1)
    complete = dict(layers)
    for path, match in numbered.items():
        for number in range(count):
            complete.setdefault(f"{match[1]}{number}{match[3]}", _zeros_like(layers[path]))
    return complete


def _with_companions(
    layers: Mapping[str, Update], updates: Updates, base: BaseShape | None
) -> dict[str, Update]:
    """Add zeros for the projections that SGLang joins with adapted ones."""
    complete = dict(layers)
    for path in layers:
        parent, _, name = path.rpartition(".")
        for other, width in _companions(name, base).items():
            companion = f"{parent}.{other}"
            if companion in complete:
                continue
            same_width = {
                "k_proj": "v_proj",
                "v_proj": "k_proj",
                "up_proj": "gate_proj",
                "gate_proj": "up_proj",
            }
            twin = layers.get(f"{parent}.{same_width.get(other)}")
            width = width or (len(twin.B) if twin else None)
            if width is None:
                raise ValueError(
                    f"{updates.source} adapts {path!r} without its {other}, which {_SERVER} expects with it. Name "
                    "the base model's folder with `--base`, so that zeros of its size can be added; or adapt "
                    f"{other}, too."
                )
            complete[companion] = _zeros_like(layers[path], width)
    return complete


def _companions(name: str, base: BaseShape | None) -> dict[str, Any]:
    """The projections that SGLang joins with this one, with the number of rows of their weights, if it is known."""
    if name in ("q_proj", "k_proj", "v_proj"):
        return {"q_proj": base and base.q_width, "v_proj": base and base.kv_width}
    return {"gate_proj": None, "up_proj": None} if name in ("gate_proj", "up_proj") else {}


def _zeros_like(update: Update, width: int | None = None) -> Update:
    B = update.B if width is None else update.B.new_zeros(width, update.rank)
    return Update(torch.zeros_like(update.A), torch.zeros_like(B), update.kind, update.kernel)
