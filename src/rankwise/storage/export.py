"""An AdaLoRA adapter as a plain LoRA adapter, which every LoRA server loads.

The update s * B diag(E) A of a layer that kept k triplets is that of a LoRA layer of rank k whose A has its rows
multiplied by s * E. This is exact: no product is formed and nothing is approximated. Layers at rank 0 are left out.

Servers differ in how they scale layers of different ranks. PEFT follows ``rank_pattern`` and ``alpha_pattern``,
vLLM applies ``lora_alpha / r`` to every layer, llama.cpp divides ``lora_alpha`` by each tensor's own rank. The
export sets alpha to the rank in every layer, which PEFT and vLLM read alike; with ``pad=True`` all layers get one
rank, by adding triplets of zeros, and then all three do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.adapters import AdapterLayer
from rankwise.attach.attachment import adapter_layers, base_scaling
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.files.atomic import write_folder
from rankwise.model import PeftModel
from rankwise.storage import OWNED, PREFIX, WEIGHTS_NAME, read_adapter, read_model_adapter


def save_as_lora(
    save_directory: str | os.PathLike[str],
    adapter: PeftModel | str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    pad: bool = False,
    dtype: torch.dtype | None = None,
) -> LoraConfig:
    """Write an AdaLoRA adapter as a plain LoRA adapter with a rank per layer, exactly.

    Args:
        save_directory: the folder to write; made if need be, replaced as a whole.
        adapter: an adapted model, or an adapter folder. Of a folder, only linear layers and embeddings can be
            exported, because it doesn't say which layers are convolutions.
        adapter_name: which adapter of the model.
        pad: give all layers the same rank, for servers that take only one.
        dtype: of the written factors, such as ``torch.bfloat16``; as they are if None.

    Returns:
        The configuration that was written.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the adapter is no AdaLoRA adapter, or has rank 0 in all layers.
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
    if isinstance(adapter, PeftModel):
        file = read_model_adapter(adapter, adapter_name)
        layers = adapter_layers(adapter, adapter_name)
    else:
        file, layers = read_adapter(Path(adapter)), {}
    if not isinstance(file.config, AdaLoraConfig):
        raise ValueError(f"{file.source} is a plain LoRA adapter already.")
    factors = {path: _folded(file.config, path, own, layers.get(path)) for path, own in file.factors.items()}
    factors = {path: (A, B) for path, (A, B) in factors.items() if len(A)}
    if not factors:
        raise ValueError(f"{file.source} has rank 0 in all layers, so there is nothing to export.")
    if pad:
        factors = _padded(factors)
    config = _lora_config(file.config, {path: len(A) for path, (A, _) in factors.items()}, dict(file.factors))
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in file.others.items()}
    for path, (A, B) in factors.items():
        for factor, tensor in (("A", A), ("B", B)):
            made = layers[path].to_file(factor, tensor, adalora=False) if path in layers else tensor
            name = file.kinds[path].file_name(path, factor, adalora=False)
            tensors[PREFIX + name] = made.to(dtype or made.dtype)

    def write(folder: Path) -> None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS_NAME,
                  metadata={"format": "pt"})  # fmt: skip
        config.save_pretrained(folder)

    write_folder(Path(save_directory), write, owned=OWNED)
    return config


def _folded(
    config: AdaLoraConfig, path: str, own: Mapping[str, Tensor], layer: AdapterLayer | None
) -> tuple[Tensor, Tensor]:
    """A (k, d_in) with E and the scale in it, and B (d_out, k), of one layer."""
    A, B = own["A"] * (own["E"] * base_scaling(config, path, config.init_r)), own["B"]
    return (A, B) if layer is None else layer.as_lora(A, B)


def _padded(factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    if any(len(A) != B.shape[1] for A, B in factors.values()):
        raise ValueError("`pad` is not for adapters of grouped convolutions: export without it.")
    rank = max(len(A) for A, _ in factors.values())

    def zeros(count: int, like: Tensor, dim: int) -> Tensor:
        shape = list(like.shape)
        shape[dim] = count
        return like.new_zeros(shape)

    return {
        path: (torch.cat([A, zeros(rank - len(A), A, 0)]), torch.cat([B, zeros(rank - len(A), B, 1)], 1))
        for path, (A, B) in factors.items()
    }


def _lora_config(config: AdaLoraConfig, ranks: dict[str, int], adapted: dict[str, Any]) -> LoraConfig:
    """Rank and alpha of every layer equal, so that the scale is 1 everywhere."""
    top = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != top}
    every_layer_is_left = len(ranks) == len(adapted)
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
    )
