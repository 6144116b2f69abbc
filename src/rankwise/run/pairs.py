"""The factors of one adapted layer: where its A and B are, and how its ranks lie in them.

A LoRA layer adds ``scale * B A`` to its weight. The method reads and writes A, B and the scale, and nothing else of the
layer. So it runs on any layer for which somebody says where these three are: that is a `FactorPair`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

KEYS = ("A", "B")
_RANK_DIM = {"A": 0, "E": 0, "B": 1}  # the dimension that counts ranks


class FactorsGone(LookupError):
    """The adapter was taken out of a layer."""


class FactorPair(ABC):
    """The factors of one adapted layer. Subclass it to run the method on a LoRA layer of your own.

    The factors are looked up anew each time they are needed, because tools such as ``fully_shard`` replace parameters.

    Args:
        path: the layer's name, as summaries and the history show it. It must be unique in the run.

    Attributes:
        blocks: how many matrices the layer holds, each with ranks of its own, such as the experts of a stack.
        starts_at_zero: the factor that is 0 at the start, "A" or "B". LoRA's linear layers start with B = 0.

    Example:
        >>> class MyPair(FactorPair):
        ...     def __init__(self, path, layer):
        ...         super().__init__(path)
        ...         self.layer = layer
        ...     def parameter(self, key):
        ...         return self.layer.down.weight if key == "A" else self.layer.up.weight
        ...     @property
        ...     def scale(self):
        ...         return self.layer.scale
        ...     @scale.setter
        ...     def scale(self, value):
        ...         self.layer.scale = value
        >>> layer = nn.Module()
        >>> layer.down, layer.up, layer.scale = nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False), 1.0
        >>> MyPair("fc", layer).rows("B", layer.up.weight).shape  # one row for each rank
        torch.Size([2, 3])
    """

    blocks: int = 1
    starts_at_zero: str = "B"

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def parameter(self, key: str) -> nn.Parameter:
        """A, whose first dimension counts ranks, or B, whose second dimension does; ``key`` is "A" or "B"."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The number that ``B A`` is multiplied by in the layer's forward pass. It must be settable."""

    @scale.setter
    @abstractmethod
    def scale(self, value: float) -> None: ...

    def check_writable(self) -> None:  # noqa: B027 - nothing forbids it
        """Called before a cut: see that the factors may be changed.

        Raises:
            ValueError: they may not; the message says what to do.
        """

    def narrow(self, kept: Tensor) -> None:  # noqa: B027 - most layers keep the zeros
        """Called when the choice of ranks is final: ``kept``, (ranks,), bool on the CPU, block by block.

        The other ranks are 0 in A and B. A layer may drop them; by default it keeps the zeros.
        """

    def widen(self) -> None:  # noqa: B027
        """Undo `narrow`, where it dropped nothing for good: a run goes back to an earlier checkpoint."""

    def base_weight(self) -> Tensor | None:
        """The weight that the layer adapts, if it is known: an optimizer that trains it alone was made too early."""
        return None

    def order(self, key: str, ranks: int) -> Tensor | None:
        """The order in which the ``ranks`` of a factor are read, (ranks,), int64, so that each block's lie together.

        None: they lie so.
        """
        return None

    def device(self) -> torch.device:
        """Where the factors are."""
        return self.parameter("A").device

    # Views of a factor, of its gradient, and of what an optimizer remembers of it.

    def rows(self, key: str, values: Tensor) -> Tensor:
        """``values``, which has the factor's shape, as a matrix with one row for each rank, block by block."""
        matrix = values.transpose(0, _RANK_DIM[key]).flatten(1)
        order = self.order(key, len(matrix))
        return matrix if order is None else matrix[order.to(matrix.device)]

    def from_rows(self, key: str, rows: Tensor, shape: torch.Size) -> Tensor:
        """Undo `rows` for a factor of ``shape``. The number of ranks may differ from that of ``shape``."""
        order = self.order(key, len(rows))
        if order is not None:
            rows = rows[order.argsort().to(rows.device)]
        dim = _RANK_DIM[key]
        lengths: list[Any] = list(shape)
        lengths[0], lengths[dim] = lengths[dim], lengths[0]
        return rows.reshape(-1, *lengths[1:]).transpose(0, dim)


def block_names(path: str, blocks: int) -> list[str]:
    """What the blocks of the layer at ``path`` are called.

    Example:
        >>> block_names("mlp.experts.up", 2), block_names("q_proj", 1)
        (['mlp.experts.up.0', 'mlp.experts.up.1'], ['q_proj'])
    """
    return [path] if blocks == 1 else [f"{path}.{number}" for number in range(blocks)]
