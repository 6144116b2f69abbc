"""The export for vLLM, by the source of 0.32.

vLLM scales every layer by ``lora_alpha / r``. Versions since about 0.30 also follow ``rank_pattern`` and
``alpha_pattern``; older ones ignore them silently. Alpha equals the rank in every layer here, so the scale is 1 either
way. vLLM pads factors of different ranks to ``--max-lora-rank``, which must be one of `MAX_LORA_RANKS`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rankwise.storage.export.exported import (
    MERGE_INSTEAD,
    Exported,
    base_in_command,
    refuse_convolutions,
    refuse_whole_tensors,
)
from rankwise.storage.updates import Updates, acting, write_lora

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_HEADS = ("classifier", "score")


def export_for_vllm(folder: Path, updates: Updates, dtype: torch.dtype | None = None) -> Exported:
    """Write a folder that vLLM loads.

    Args:
        folder: the folder to write. It is created if it does not exist.
        updates: the adapter's updates.
        dtype: the dtype of the written factors; by default they keep their own.

    Raises:
        ValueError: the adapter holds something that vLLM cannot load.
        OSError: the folder can't be written. Its previous contents are then unchanged.
    """
    refuse_whole_tensors(updates, "vLLM", _HEADS)
    if updates.stacks:
        path = next(iter(updates.stacks))
        raise ValueError(
            f"{updates.source} adapts the experts {path!r}, which has not been tried with vLLM. {MERGE_INSTEAD}"
        )
    layers = acting(updates)
    refuse_convolutions(updates, layers, "vLLM")
    top = max(update.rank for update in layers.values())
    if top > MAX_LORA_RANKS[-1]:
        raise ValueError(
            f"{updates.source} has rank {top} in a layer, and vLLM takes at most {MAX_LORA_RANKS[-1]}. Cut it with "
            "`rankwise compress` first."
        )
    write_lora(folder, updates, layers, dtype)
    least = next(rank for rank in MAX_LORA_RANKS if rank >= top)
    base = base_in_command(updates)
    notes = [f"vllm serve {base} --enable-lora --max-lora-rank {least} --lora-modules NAME={folder}"]
    if updates.others:
        notes.append("The trained head is included, which older versions of vLLM refuse.")
    return Exported(folder, tuple(notes))
