"""The result of an export, and the checks that several formats share."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.attach.matching import saved_module_of
from rankwise.config import CONFIG_NAME
from rankwise.storage.lora_layout import Update
from rankwise.storage.updates import Updates

MERGE_INSTEAD = "Export the merged model instead: `--to merged`."
IN_PYTHON = "In Python: load base and adapter, `model.merge_and_unload().save_pretrained(folder)`."


class NotInBase(ValueError):
    """The adapter changes or holds a weight that the base model's files lack, such as a new head's."""


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Args:
        path: the folder or file that was written.
        notes: how to use it with the server, one line each.

    Example:
        >>> Exported(Path("adapter"), ("vllm serve BASE --enable-lora",)).notes
        ('vllm serve BASE --enable-lora',)
    """

    path: Path
    notes: tuple[str, ...] = ()


def check_place_of_model(folder: Path, base: Path | None) -> None:
    """Check that a merged model may be written into a folder.

    Args:
        folder: the folder to write.
        base: the base model's folder or file, if it is known.

    Raises:
        ValueError: the folder holds an adapter, or is the base model's.
    """
    if (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} holds an adapter, which Transformers would add to the merged model. Give another place."
        )
    if base is not None and base.exists() and folder.exists() and folder.samefile(base):
        raise ValueError(f"{folder} is the base model, which other adapters may need. Give another place.")


def base_in_command(updates: Updates) -> str:
    """The base model's name on a command line; BASE if the adapter does not record it."""
    return shlex.quote(updates.config.base_model_name_or_path or "BASE")


def refuse_whole_tensors(updates: Updates, server: str, heads: Iterable[str] = ()) -> None:
    """Refuse biases and modules saved in full, except the base weights of adapted embeddings.

    Args:
        updates: the adapter's updates.
        server: the name of the server, which can't load them.
        heads: the names of modules that it can load.

    Raises:
        ValueError: the adapter holds such a tensor. The message names it.
    """
    for name in updates.others:
        module, _, parameter = name.rpartition(".")
        if name.removesuffix(".base_layer.weight") in updates.layers:
            continue  # the weight of an adapted embedding, which PEFT saves as well
        if module.rpartition(".")[2] in heads and parameter in ("weight", "bias"):
            continue
        saved = saved_module_of(name, updates.config.modules_to_save or (), lambda path: True)
        whole = saved is not None or not name.endswith("bias")
        what = "part of a module that was trained in full" if whole else "a trained bias"
        raise ValueError(
            f"{updates.source} holds {name!r}, {what}, which {server} can't load. {MERGE_INSTEAD}"
        )


def refuse_convolutions(updates: Updates, layers: Mapping[str, Update], server: str) -> None:
    """Refuse adapters of convolutions.

    Raises:
        ValueError: the adapter adapts a convolution. The message names it.
    """
    for path, update in layers.items():
        if update.kernel:
            raise ValueError(
                f"{updates.source} adapts the convolution {path!r}, which {server} can't load. {MERGE_INSTEAD}"
            )
