"""Recognizes adapter folders, and reads their configuration as it is."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from rankwise.config import CONFIG_NAME
from rankwise.files.json_file import read_json
from rankwise.storage.names import PICKLE_NAME, WEIGHTS_NAME


def check_folder(folder: Path) -> None:
    """Refuse a folder without an adapter, and say what it holds instead.

    Raises:
        FileNotFoundError: the folder does not exist, is a file, or has no ``adapter_config.json``.
    """
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file, and an adapter is a folder. {_instead(folder)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if (folder / CONFIG_NAME).is_file():
        return
    if any((folder / name).is_file() for name in (WEIGHTS_NAME, PICKLE_NAME)):
        raise FileNotFoundError(
            f"{folder} holds an adapter's tensors, but no {CONFIG_NAME}, which tells what they mean. Copy it from "
            "where the adapter was saved."
        )
    inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_NAME}"))
    inside.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    if inside:
        raise FileNotFoundError(
            f"{folder} is not an adapter folder itself: it has no {CONFIG_NAME}, but {', '.join(inside)} in it "
            f"{'has' if len(inside) == 1 else 'have'} one. Give {folder / inside[-1]}."
        )
    if (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds a whole model, not an adapter: it has config.json, but no {CONFIG_NAME}."
        )
    raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {CONFIG_NAME}.")


def _instead(file: Path) -> str:
    """Name the folder that the user may have meant by a file."""
    if (file.parent / CONFIG_NAME).is_file():
        return f"Give the folder that the file lies in: {file.parent}."
    if file.suffix.lower() in (".yaml", ".yml"):
        return "If it is a recipe, its adapter is in the folder that it names as `output`."
    return f"Give a folder with {CONFIG_NAME}."


def holds(folder: Path, name: str) -> bool:
    """Whether a folder has a file of this name.

    Raises:
        ValueError: the name belongs to something other than a file.
    """
    path = folder / name
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{path} should be a file, but is a folder, a device or a broken link.")
    return path.is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` as it is. Fields that rankwise does not know are kept.

    Raises:
        ValueError: the file is broken, or its kind of adapter has no ranks.
    """
    path = folder / CONFIG_NAME
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds {config!r:.60}.")
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        said = "is missing" if kind is None else f"is {kind!r:.40}"
        raise ValueError(f'{path}: `peft_type` {said}. Only "LORA" and "ADALORA" adapters have ranks.')
    for name in ("init_r", "target_r", "lora_alpha") if kind == "ADALORA" else ("r", "lora_alpha"):
        value = config.get(name)
        number = isinstance(value, (int, float) if name == "lora_alpha" else int)
        if value is None or isinstance(value, bool) or not number or not 0 <= value < math.inf:
            said = "is missing" if value is None else f"is {value!r:.40}"
            raise ValueError(f"{path}: `{name}` {said}, but {kind} needs a number there.")
    for name, kinds, said in (
        ("modules_to_save", (list,), "a list of names"),
        ("target_modules", (list, str), "a list of names or an expression"),
    ):
        if config.get(name) is not None and not isinstance(config[name], kinds):
            raise ValueError(f"{path}: `{name}` must be {said}, but is {config[name]!r:.40}.")
    return config
