"""A model's embeddings: the layers that embed its inputs, and the layer that scores the vocabulary.

Transformers' models name these layers. Many have none, and raise ``NotImplementedError``. Others fail in different
ways, such as a CLIP model for images alone. The functions here treat all of these as models without embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def input_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The input embeddings of the model and of models inside it, each once. There may be none.

    In models for images and sound an input embedding can be a convolution or a linear layer.

    Example:
        >>> list(input_embeddings(nn.Linear(2, 2)))
        []
    """
    return _found(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The output layers over the vocabulary, of the model and of models inside it, each once.

    Example:
        >>> class Speller(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = nn.Linear(4, 8)
        ...     def get_input_embeddings(self):
        ...         raise NotImplementedError
        ...     def get_output_embeddings(self):
        ...         return self.head
        >>> model = nn.ModuleDict({"speller": Speller()})
        >>> list(output_embeddings(model)), list(input_embeddings(model))
        ([Linear(in_features=4, out_features=8, bias=True)], [])
    """
    return _found(model, "get_output_embeddings")


def _found(model: nn.Module, getter: str) -> Iterator[nn.Module]:
    seen: set[int] = set()
    for module in model.modules():
        found = _ask(module, getter)
        if isinstance(found, nn.Module) and id(found) not in seen:
            seen.add(id(found))
            yield found


def _ask(module: Any, getter: str) -> Any:
    ask = getattr(module, getter, None)
    if not callable(ask):
        return None
    try:
        return ask()
    except Exception:  # a model whose getter fails in any way has no such layer
        return None


def resized_vocabulary(model: Any) -> tuple[int, int] | None:
    """The vocabulary sizes of the base's checkpoint and of the model. None if they are equal or unknown.

    Only local files are read: the folder that the base was loaded from, or the hub's cache.
    """
    config: Any = getattr(model, "config", None)
    place = getattr(config, "_name_or_path", None)
    here = _vocabulary(config)
    resized = vars(model).get("_rankwise_vocabulary") if here is not None else None
    if resized is not None:
        return None if resized == here else (resized, here)  # type: ignore[return-value]
    if here is None or not isinstance(place, str) or not place:
        return None
    options = {"local_files_only": True, "revision": getattr(config, "_commit_hash", None) or "main"}
    try:
        if not type(config).get_config_dict(place, **options)[0]:
            return None  # a folder without a configuration, such as one with a GGUF file
        before = _vocabulary(type(config).from_pretrained(place, **options))
    except Exception:  # the checkpoint was removed, was never cached, or is of another kind of model
        return None
    return None if before is None or before == here else (before, here)


def _vocabulary(config: Any) -> int | None:
    text = getattr(config, "get_text_config", None)
    for each in (text() if callable(text) else None, config):
        size = getattr(each, "vocab_size", None)
        if isinstance(size, int):
            return size
    return None
