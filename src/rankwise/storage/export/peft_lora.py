"""The export as plain LoRA with its own rank for each layer, which PEFT and most LoRA servers load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rankwise.config import LoraConfig
from rankwise.files.atomic import refuse_existing
from rankwise.storage.export.padding import padded
from rankwise.storage.updates import acting, read_updates, write_lora

if TYPE_CHECKING:
    from rankwise.model import PeftModel


def save_as_lora(
    save_directory: str | os.PathLike[str],
    adapter: PeftModel | str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    pad: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> LoraConfig:
    """Write any adapter as a plain LoRA adapter whose scale is 1 in every layer. This is exact.

    AdaLoRA's default form saves plain LoRA already. This function is for the paper's form, whose files have a third
    factor; and for servers that need one rank, or factors of another dtype. Layers at rank 0 are left out. With
    ``pad``, those of the paper's form are written as zeros instead.

    Args:
        save_directory: the folder to write. It is created if it does not exist.
        adapter: an adapted model, or an adapter folder. From a folder in PEFT's AdaLoRA format, only linear layers and
            embeddings can be exported, because it does not mark convolutions.
        adapter_name: the adapter's name in the model.
        pad: whether to give all layers the same rank, for servers that need it.
        dtype: the dtype of the written factors, such as ``torch.bfloat16``. By default they keep their own.
        overwrite: whether to replace the contents of the folder.

    Returns:
        The configuration that was written.

    Raises:
        FileNotFoundError: the adapter folder does not exist.
        FileExistsError: ``save_directory`` is not empty, and ``overwrite`` is False.
        ValueError: the adapter has rank 0 in all layers.
        OSError: the folder can't be written. Its previous contents are then unchanged.

    Example:
        >>> import tempfile, torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> config = rw.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["0", "2"])
        >>> model = rw.get_peft_model(model, config)
        >>> model.finalize_ranks()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rw.save_as_lora(folder, model).r
        2
    """
    path = Path(save_directory)
    if not overwrite:
        refuse_existing(path)
    updates = read_updates(adapter, adapter_name)
    layers = padded(updates) if pad else acting(updates)
    return write_lora(path, updates, layers, dtype)
