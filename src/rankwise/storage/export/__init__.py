"""Exports an adapter in the format that a server reads, with one module for each format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from rankwise.files.atomic import refuse_existing
from rankwise.storage.export.exported import Exported
from rankwise.storage.export.peft_lora import save_as_lora
from rankwise.storage.updates import acting, read_updates, write_lora

if TYPE_CHECKING:
    from rankwise.model import PeftModel

__all__ = ["Exported", "Target", "export_adapter", "save_as_lora"]

Target = Literal["peft-lora", "vllm", "sglang", "gguf", "diffusers", "merged"]


def export_adapter(
    output: str | os.PathLike[str],
    adapter: PeftModel | str | os.PathLike[str],
    to: Target,
    *,
    base: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    component: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a LoRA or AdaLoRA adapter in the format that a server reads. It is exact up to rounding to ``dtype``.

    Args:
        output: the folder to write; for "gguf" the file.
        adapter: an adapted model, or an adapter folder that rankwise or PEFT wrote. From a folder in PEFT's AdaLoRA
            format, only linear layers and embeddings can be exported, because it does not mark convolutions.
        to: the format:

            - "peft-lora": plain LoRA with its own rank for each layer.
            - "vllm": for vLLM.
            - "sglang": for SGLang and LoRAX. All layers have one rank, padded with zeros.
            - "gguf": for llama.cpp and Ollama.
            - "diffusers": for ``pipe.load_lora_weights``.
            - "merged": a whole model in the base's dtype.

        base: the base model's folder; for "gguf" also its ``.gguf`` file. By default it is read from the adapter's
            configuration. "sglang" needs it only if the adapter lacks layers that the server expects.
        adapter_name: the adapter's name in the model.
        dtype: the dtype of the written factors, such as ``torch.bfloat16``. By default they keep their own. Not allowed
            for "merged".
        component: for "diffusers", the adapted model's name in the pipeline, such as "unet" or "transformer". It is
            recognized by its layers by default.
        overwrite: whether to replace ``output`` if it exists.

    Returns:
        The path that was written, and how to use it with the server.

    Raises:
        FileNotFoundError: the adapter folder does not exist, or a base model is needed and not found.
        FileExistsError: ``output`` exists and is not empty, and ``overwrite`` is False.
        ValueError: the server can't load this adapter. The message says why, and what to do instead.
        OSError: ``output`` can't be written. Its previous contents are then unchanged.

    Example:
        >>> import tempfile, torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> config = rw.LoraConfig(r=5, use_rslora=True, target_modules=["0", "2"])
        >>> model = rw.get_peft_model(model, config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = rw.export_adapter(folder, model, "vllm")
        >>> exported.notes[0].partition("--lora-modules")[0]
        'vllm serve BASE --enable-lora --max-lora-rank 8 '
    """
    if to not in get_args(Target):
        raise ValueError(f"`to` must be one of {', '.join(get_args(Target))}, but is {to!r}.")
    if component is not None and to != "diffusers":
        raise ValueError(
            f"`component` belongs to 'diffusers', whose pipelines have several models, and not to {to!r}."
        )
    path, base = Path(output), None if base is None else Path(base)
    if not overwrite:
        refuse_existing(path)
    updates = read_updates(adapter, adapter_name)
    # Each format's module is imported only when it is used, so that `import rankwise` stays fast.
    if to == "vllm":
        from rankwise.storage.export.vllm import export_for_vllm

        return export_for_vllm(path, updates, dtype)
    if to == "sglang":
        from rankwise.storage.export.base import base_path, read_base_shape
        from rankwise.storage.export.sglang import export_for_sglang

        named = updates.config.base_model_name_or_path
        here = base is not None or (named is not None and Path(named).exists())
        shape = read_base_shape(base_path(updates, base, "this export")) if here else None
        return export_for_sglang(path, updates, dtype, shape)
    if to == "diffusers":
        from rankwise.storage.export.diffusers import export_for_diffusers

        return export_for_diffusers(path, updates, dtype, component)
    if to == "gguf":
        from rankwise.storage.export.gguf import export_for_llama_cpp

        return export_for_llama_cpp(path, updates, dtype, base)
    if to == "merged":
        if dtype is not None:
            raise ValueError("`dtype` does not go with 'merged', which keeps the dtypes of the base model.")
        from rankwise.storage.export.merged import export_merged

        return export_merged(path, updates, base)
    write_lora(path, updates, acting(updates), dtype)
    return Exported(path, ("PEFT: PeftModel.from_pretrained(base, folder)",))
