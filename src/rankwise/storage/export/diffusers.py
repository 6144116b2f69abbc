"""The export for diffusers (tested with 0.42): a file that ``pipe.load_lora_weights`` applies.

A pipeline has several models, so each tensor's name begins with the adapted model's name in the pipeline, such as
``unet.`` or ``transformer.``. Alpha equals the rank in every layer, so the scale is 1 in every version of diffusers
that supports ranks per layer. Versions since 0.34 read the configuration in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rankwise.files.atomic import write_folder
from rankwise.storage import PREFIX
from rankwise.storage.export.exported import Exported, refuse_whole_tensors
from rankwise.storage.lora_layout import Update, named_tensors
from rankwise.storage.updates import Updates, acting

FILE_NAME = "pytorch_lora_weights.safetensors"
_METADATA_KEY = "lora_adapter_metadata"
# The first parts of layers' paths in diffusers' models, by which a component is recognized.
_STARTS = {
    "unet": (
        "down_blocks",
        "mid_block",
        "up_blocks",
        "conv_in",
        "conv_out",
        "time_embedding",
        "add_embedding",
    ),
    "transformer": (
        "transformer_blocks",
        "single_transformer_blocks",
        "blocks",
        "layers",
        "proj_out",
        "x_embedder",
        "context_embedder",
        "time_text_embed",
        "pos_embed",
    ),
    "text_encoder": ("text_model", "text_projection"),
}


def export_for_diffusers(
    folder: Path, updates: Updates, dtype: torch.dtype | None = None, component: str | None = None
) -> Exported:
    """Write a folder that ``pipe.load_lora_weights`` applies.

    Args:
        folder: the folder to write. It is created if it does not exist.
        updates: the adapter's updates.
        dtype: the dtype of the written factors; by default they keep their own.
        component: the adapted model's name in the pipeline, such as "unet", "transformer" or "text_encoder_2". By
            default it is recognized by its layers.

    Raises:
        ValueError: the adapter holds something that diffusers cannot load, or its layers match no component.
        OSError: the folder can't be written. Its previous contents are then unchanged.
    """
    refuse_whole_tensors(updates, "diffusers' `load_lora_weights`")
    layers = acting(updates)
    for path, update in layers.items():
        _check(updates, path, update)
    name = _component(updates, layers) if component is None else _checked(component)
    tensors = {
        f"{name}.{key.removeprefix(PREFIX)}": tensor.contiguous()
        for path, update in layers.items()
        for key, tensor in named_tensors(path, update, dtype).items()
    }
    config = {f"{name}.{key}": value for key, value in _config(layers).items()}
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}

    def write(temporary: Path) -> None:
        save_file(tensors, temporary / FILE_NAME, metadata=metadata)

    write_folder(folder, write, owned=(FILE_NAME,))
    return Exported(folder, (f"diffusers: pipe.load_lora_weights({str(folder)!r})  # into pipe.{name}",))


def _config(layers: Mapping[str, Update]) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig. Patterns are anchored, because a path may be the end of another one."""
    ranks = {path: update.rank for path, update in layers.items()}
    top = max(ranks.values())
    others = {f"^{path}": rank for path, rank in ranks.items() if rank != top}
    return {
        "r": top,
        "lora_alpha": top,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(layers),
    }


def _check(updates: Updates, path: str, update: Update) -> None:
    if any(path in names for names in updates.stacks.values()):
        raise ValueError(f"{updates.source} adapts the experts {path!r}, which diffusers has no place for.")
    if update.grouped:
        raise ValueError(
            f"{updates.source} adapts the grouped convolution {path!r}, whose rank diffusers can't determine. Train "
            "without it (`exclude_modules`)."
        )
    if not any(key.endswith("lora_B.weight") for key in named_tensors(path, update)):
        raise ValueError(
            f"{updates.source} adapts the embedding {path!r}, which diffusers' `load_lora_weights` can't load. Train "
            "without it (`exclude_modules`)."
        )


def _checked(component: str) -> str:
    if not component.isidentifier():
        raise ValueError(
            f"`component` must be the adapted model's name in the pipeline, such as 'unet', but is {component!r}."
        )
    return component


def _component(updates: Updates, paths: Iterable[str]) -> str:
    starts = {path.partition(".")[0] for path in paths}
    found = [name for name, known in _STARTS.items() if starts & set(known)]
    if len(found) != 1:
        raise ValueError(
            f"{updates.source} adapts layers under {', '.join(sorted(starts)[:6])}, which don't show the model's name "
            "in a pipeline. Give it: `component='unet'` (`--component unet`), or 'transformer', 'text_encoder', ..."
        )
    return found[0]
