"""What the files of an adapter folder say about themselves: the configuration, and the tensors' names and shapes.

No tensor is read, so a folder of any size is looked into at once. What can't be read is refused by name, with what is
wrong and how to mend it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.config import CONFIG_NAME
from rankwise.storage import PICKLE_NAME, WEIGHTS_NAME

_POINTER = b"version https://git-lfs"
_CONVERT = (
    "import torch; from safetensors.torch import save_file; "
    "tensors = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "
    "'adapter_model.safetensors', metadata={'format': 'pt'})"
)
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape and dtype (``"float32"``), as a file's header has them."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        size = 1
        for length in self.shape:
            size *= length
        return size


def check_folder(folder: Path) -> None:
    """Refuse what is no adapter folder, and say what it is instead.

    Raises:
        ValueError: it does not exist, is a file, or has no ``adapter_config.json``.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Give the adapter's folder: {folder.parent}.")
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if (folder / CONFIG_NAME).is_file():
        return
    if any((folder / name).is_file() for name in (WEIGHTS_NAME, PICKLE_NAME)):
        raise ValueError(
            f"{folder} holds an adapter's tensors, but not what they mean: {CONFIG_NAME} is missing. "
            "Copy it from where the adapter was saved."
        )
    inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_NAME}"))
    inside.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    if inside:
        raise ValueError(
            f"{folder} is no adapter folder itself, but {', '.join(inside)} in it {_are(len(inside))}. "
            f"Inspect {folder / inside[-1]}."
        )
    if (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds a whole model, not an adapter: it has config.json, not {CONFIG_NAME}."
        )
    raise ValueError(f"{folder} is no adapter folder: it has no {CONFIG_NAME}.")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``, as it is: fields that rankwise doesn't know stay.

    Raises:
        ValueError: it is broken, or of a kind of adapter that has no ranks.
    """
    path = folder / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is broken: it is no UTF-8 text ({error}).") from error
    if text.startswith(_POINTER.decode()):
        raise ValueError(_pointer_message(path))
    try:
        config = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is broken: it is no valid JSON ({error}). Save the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is broken: it must hold an object, but holds {config!r:.60}.")
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        said = "is missing" if kind is None else f"is {kind!r:.40}"
        raise ValueError(
            f'{path}: `peft_type` {said}. Only "LORA" and "ADALORA" adapters have ranks to inspect.'
        )
    names = ("init_r", "target_r", "lora_alpha") if kind == "ADALORA" else ("r", "lora_alpha")
    for name in names:
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


def read_header(folder: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the tensors in ``adapter_model.safetensors``.

    Raises:
        ValueError: the file is missing, broken or cut off, or there is only a pickle.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(_missing_message(folder))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return {
                name: TensorInfo(
                    tuple(each.get_shape()), _DTYPES.get(each.get_dtype(), each.get_dtype().lower())
                )
                for name, each in slices.items()
            }
    except SafetensorError as error:
        with open(path, "rb") as raw:
            start = raw.read(len(_POINTER))
        if start == _POINTER:
            raise ValueError(_pointer_message(path)) from error
        raise ValueError(
            f"{path} is broken or cut off: its {path.stat().st_size:,} bytes are no whole safetensors file "
            f"({error}). Copy or download it again."
        ) from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _missing_message(folder: Path) -> str:
    if not (folder / PICKLE_NAME).is_file():
        return f"{folder} is incomplete: it has {CONFIG_NAME}, but no {WEIGHTS_NAME}."
    return (
        f"{folder} has its tensors only as {PICKLE_NAME}: a pickle, which has no header to read and can run code "
        f'when it is opened. If you trust it, convert it, in that folder: python -c "{_CONVERT}"'
    )


def _pointer_message(path: Path) -> str:
    return f"{path} is a Git LFS pointer, not the file itself. Fetch it with: git lfs pull"


def _are(count: int) -> str:
    return "is one" if count == 1 else "are"
