"""The kinds of layer that can be adapted, found by a layer or by a name in a file."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from rankwise.adapters.conv import Conv1dAdapters, Conv2dAdapters, Conv3dAdapters
from rankwise.adapters.embedding import EmbeddingAdapters
from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.linear import Conv1DAdapters, LinearAdapters
from rankwise.adapters.parameter import ParameterAdapters
from rankwise.adapters.quantized import Bnb4bitAdapters, Bnb8bitAdapters, PackedLinearAdapters

# The first kind that fits a layer adapts it. Quantized layers come first, because they are linear layers, too.
KINDS: tuple[type[AdapterLayer], ...] = (
    Bnb4bitAdapters,
    Bnb8bitAdapters,
    PackedLinearAdapters,
    LinearAdapters,
    Conv1DAdapters,
    Conv2dAdapters,
    Conv1dAdapters,
    Conv3dAdapters,
    EmbeddingAdapters,
)


def adapters_for(layer: nn.Module) -> type[AdapterLayer] | None:
    """The mixin that adapts this kind of layer, or None if there is none."""
    if ParameterAdapters.adapts(layer):  # not a kind of layer: it is recognized by the names of parameters
        return ParameterAdapters
    return next((kind for kind in KINDS if kind.adapts(layer)), None)


def in_all_linear(layer: nn.Module) -> bool:
    """Whether `target_modules="all-linear"` means it."""
    kind = adapters_for(layer)
    return kind is not None and kind.in_all_linear


def kinds_in_words() -> str:
    """The kinds that can be adapted, for messages: "Linear, Conv2d and Embedding"."""
    *most, last = dict.fromkeys(kind.called for kind in KINDS)
    return f"{', '.join(most)} and {last}"


@dataclass(frozen=True)
class FactorName:
    """Parse the name of a factor in a file.

    Args:
        path: of the layer.
        factor: "A", "B" or "E".
        kind: one of the kinds whose factors are called so.
    """

    path: str
    factor: str
    kind: type[AdapterLayer]


_BY_PREFIX = {kind.file_prefix: kind for kind in reversed(KINDS)}
_NAME = re.compile(rf"(.+)\.({'|'.join(sorted(_BY_PREFIX, key=len, reverse=True))})([ABE])(?:\.weight)?")


def factor_name(name: str) -> FactorName | None:
    """Take a tensor's name in a file apart, which is without PEFT's prefix; None if it is no factor's.

    Example:
        >>> factor_name("model.layers.0.q_proj.lora_A.weight").path
        'model.layers.0.q_proj'
        >>> factor_name("model.embed.lora_embedding_B").kind.called
        'Embedding'
        >>> factor_name("score.weight") is None
        True
    """
    match = _NAME.fullmatch(name)
    return match and FactorName(match[1], match[3], _BY_PREFIX[match[2]])
