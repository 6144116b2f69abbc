"""What an export came to, and the refusals that several targets share."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.attach.matching import saved_module_of
from rankwise.storage.lora_layout import Update
from rankwise.storage.updates import Updates

MERGE_INSTEAD = "Export the merged model instead: `--to merged`."
IN_PYTHON = "In Python: load base and adapter, `model.merge_and_unload().save_pretrained(folder)`."


class NotInBase(ValueError):
    """The adapter changes or holds a weight that the base model's files have not, such as a new head's."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how to use it.

    Args:
        path: the folder or file.
        notes: what the server has to be told, one line each.
    """

    path: Path
    notes: tuple[str, ...] = ()


def base_in_command(updates: Updates) -> str:
    """What a command line calls the base model; BASE where the adapter does not say it."""
    return shlex.quote(updates.config.base_model_name_or_path or "BASE")


def refuse_whole_tensors(updates: Updates, server: str, heads: Iterable[str] = ()) -> None:
    """Refuse biases and modules saved whole, other than the base weights of adapted embeddings.

    Args:
        updates: of the adapter.
        server: which takes none.
        heads: names of modules that it takes all the same.

    Raises:
        ValueError: there is one; the message names it.
    """
    for name in updates.others:
        module, _, parameter = name.rpartition(".")
        if name.removesuffix(".base_layer.weight") in updates.layers:
            continue  # an adapted embedding's own weight, which PEFT writes along
        if module.rpartition(".")[2] in heads and parameter in ("weight", "bias"):
            continue
        saved = saved_module_of(name, updates.config.modules_to_save or (), lambda path: True)
        whole = saved is not None or not name.endswith("bias")
        what = "part of a module that was trained whole" if whole else "a trained bias"
        raise ValueError(f"{updates.source} holds {name!r}, {what}, and {server} takes none. {MERGE_INSTEAD}")


def refuse_convolutions(updates: Updates, layers: Mapping[str, Update], server: str) -> None:
    """Refuse adapters of convolutions.

    Raises:
        ValueError: there is one; the message names it.
    """
    for path, update in layers.items():
        if update.kernel:
            raise ValueError(
                f"{updates.source} adapts the convolution {path!r}, and {server} takes none. {MERGE_INSTEAD}"
            )
