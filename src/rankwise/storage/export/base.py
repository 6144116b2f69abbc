"""Facts about the base model that exports need, from its folder's ``config.json`` or a ``.gguf`` file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.storage.updates import Updates

# By Transformers' model_type: llama.cpp's architecture.
_DECODERS = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}


@dataclass(frozen=True)
class BaseShape:
    """The shape of a decoder.

    Args:
        source: the folder or file that it was read from.
        architecture: llama.cpp's name of the architecture; None if it is unknown.
        layers: the number of layers.
        heads: the number of attention heads.
        kv_heads: the number of heads of keys and values.
        head_width: the width of a head.
        tied: whether the output layer shares the input embedding's weight.
    """

    source: str
    architecture: str | None
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    tied: bool

    @property
    def q_width(self) -> int:
        """The number of rows in q's weight."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """The number of rows in k's and in v's weight."""
        return self.kv_heads * self.head_width


def base_path(updates: Updates, base: Path | None, what_for: str) -> Path:
    """The path of the base model: the given one, or the one in the adapter's configuration.

    Raises:
        FileNotFoundError: it is neither a local folder nor a local file.
    """
    named = str(base) if base is not None else updates.config.base_model_name_or_path
    if named is None:
        raise FileNotFoundError(
            f"{updates.source} does not say what its base model is, and {what_for} needs it. Name its folder: "
            "`--base MODEL`."
        )
    if not Path(named).exists():
        raise FileNotFoundError(
            f"The base model {named!r} is not a local folder, and {what_for} needs it. Download it (`hf download "
            f"{named} --local-dir DIR`) and name the folder: `--base DIR`."
        )
    return Path(named)


def read_base_shape(path: Path) -> BaseShape:
    """Read the shape of the model in a folder or a ``.gguf`` file.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: the model is not a decoder with the usual fields.
    """
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _from_gguf(path)
    config = read_base_config(path)
    config = config.get("text_config") or config
    try:
        heads = int(config["num_attention_heads"])
        return BaseShape(
            source=str(path),
            architecture=_DECODERS.get(config.get("model_type", "")),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_width=int(config.get("head_dim") or config["hidden_size"] // heads),
            tied=bool(config.get("tie_word_embeddings", config.get("model_type", "").startswith("gemma"))),
        )
    except KeyError as missing:
        raise ValueError(
            f"{path / 'config.json'} has no {missing}, so its layers and heads are not known."
        ) from None


def read_base_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's ``config.json``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not valid JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not the folder of a model: no config.json.")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from None
    return config


def _from_gguf(path: Path) -> BaseShape:
    import gguf

    reader = gguf.GGUFReader(path)

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        if found is None and default is None:
            raise ValueError(f"{path} has no {name!r}, so its layers and heads are not known.")
        return default if found is None else found.contents()

    arch = field(gguf.Keys.General.ARCHITECTURE)
    heads = int(field(gguf.Keys.Attention.HEAD_COUNT.format(arch=arch)))
    width = int(field(gguf.Keys.LLM.EMBEDDING_LENGTH.format(arch=arch)))
    return BaseShape(
        source=str(path),
        architecture=arch if arch in _DECODERS.values() else None,
        layers=int(field(gguf.Keys.LLM.BLOCK_COUNT.format(arch=arch))),
        heads=heads,
        kv_heads=int(field(gguf.Keys.Attention.HEAD_COUNT_KV.format(arch=arch), heads)),
        head_width=int(field(gguf.Keys.Attention.KEY_LENGTH.format(arch=arch), width // heads)),
        tied=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )
