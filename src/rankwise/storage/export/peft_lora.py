"""An adapter as a plain LoRA adapter with a rank for each layer, which PEFT and most LoRA servers load."""

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
    """Write any adapter as a plain LoRA adapter whose scale is 1 in every layer, exactly.

    What the default form of AdaLoRA saves is plain LoRA already. This is for the paper's form, whose files have a third
    factor; and for servers that take one rank only, or factors of another dtype. Layers at rank 0 are left out; with
    ``pad`` those of the paper's form stay, as zeros.

    Args:
        save_directory: the folder to write; made if need be.
        adapter: an adapted model, or an adapter folder. Of a folder in PEFT's AdaLoRA format, only linear layers and
            embeddings can be exported, because it doesn't say which layers are convolutions.
        adapter_name: which adapter of the model.
        pad: give all layers the same rank, for servers that take only one.
        dtype: of the written factors, such as ``torch.bfloat16``; as they are if None.
        overwrite: replace what is in the folder.

    Returns:
        The configuration that was written.

    Raises:
        FileNotFoundError: there is no such adapter folder.
        FileExistsError: ``save_directory`` is not empty, and ``overwrite`` is False.
        ValueError: the adapter has rank 0 in all layers.
        OSError: it can't be written; what was there before is whole.

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
