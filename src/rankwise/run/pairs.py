"""The factors of one adapted layer: where its A and B are, and how its ranks are arranged in them.

A LoRA layer adds ``scale * B A`` to its weight. The method reads and writes only A, B and the scale. It therefore runs
on any layer for which a `FactorPair` tells where these three are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

KEYS = ("A", "B")


class FactorsGone(LookupError):
    """The adapter was taken out of a layer."""


class FactorPair(ABC):
    """The factors of one adapted layer. Subclass it to run the method on a LoRA layer of your own.

    The factors are looked up each time they are needed, because tools such as ``fully_shard`` replace parameters.

    Args:
        path: the layer's name in summaries and in the history. It must be unique in the run.

    Attributes:
        blocks: the number of matrices in the layer that have ranks of their own, such as the experts of a stack.
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
        """Return a factor.

        Args:
            key: "A" for the factor whose first dimension counts ranks, such as (r, d_in); "B" for the factor whose
                second dimension counts ranks, such as (d_out, r).
        """

    @property
    @abstractmethod
    def scale(self) -> float:
        """The number that multiplies ``B A`` in the layer's forward pass. It must be settable."""

    @scale.setter
    @abstractmethod
    def scale(self, value: float) -> None: ...

    def check_writable(self) -> None:  # noqa: B027 - nothing forbids it
        """Check that the factors may be changed. Called before a cut.

        Raises:
            ValueError: they may not; the message says what to do.
        """

    def narrow(self, kept: Tensor) -> None:  # noqa: B027 - most layers keep the zeros
        """Drop ranks for good, if the layer can. Called when the choice of ranks is final.

        By default the layer keeps the other ranks, which are 0 in A and B.

        Args:
            kept: the ranks to keep, (ranks,), bool, on the CPU, block by block.
        """

    def widen(self) -> None:  # noqa: B027
        """Undo `narrow` if it did not drop anything for good: the run goes back to an earlier checkpoint."""

    def base_weight(self) -> Tensor | None:
        """The weight that the layer adapts, or None. It serves to detect an optimizer that was built too early."""
        return None

    def order(self, key: str, ranks: int) -> Tensor | None:
        """The order in which to read a factor's ranks, so that each block's ranks are next to each other.

        Args:
            key: "A" or "B".
            ranks: the number of ranks in the factor.

        Returns:
            (ranks,), int64; None if the ranks already have this order.
        """
        return None

    def device(self) -> torch.device:
        """The device of the factors."""
        return self.parameter("A").device

    # Views of a factor, its gradient, and an optimizer's state for it.

    def rows(self, key: str, values: Tensor) -> Tensor:
        """Arrange values by rank.

        Args:
            key: "A" or "B".
            values: a tensor in the factor's shape.

        Returns:
            The values as a matrix, (ranks, width), with one row for each rank, block by block.
        """
        matrix = (values.transpose(0, 1) if key == "B" else values).flatten(1)
        order = self.order(key, len(matrix))
        return matrix if order is None else matrix[order.to(matrix.device)]

    def from_rows(self, key: str, rows: Tensor, shape: torch.Size) -> Tensor:
        """Arrange the rows of a matrix as a factor again, the inverse of `rows`.

        Args:
            key: "A" or "B".
            rows: a matrix with one row for each rank, (ranks, width).
            shape: the factor's shape. Its number of ranks may differ from that of ``rows``.

        Returns:
            The values in the layer's shape, with as many ranks as ``rows`` has.
        """
        order = self.order(key, len(rows))
        if order is not None:
            rows = rows[order.argsort().to(rows.device)]
        if key == "B":
            return rows.reshape(-1, shape[0], *shape[2:]).transpose(0, 1)
        return rows.reshape(-1, *shape[1:])


def block_names(path: str, blocks: int) -> list[str]:
    """The names of the blocks in the layer at ``path``.

    Example:
        >>> block_names("mlp.experts.up", 2), block_names("q_proj", 1)
        (['mlp.experts.up.0', 'mlp.experts.up.1'], ['q_proj'])
    """
    return [path] if blocks == 1 else [f"{path}.{number}" for number in range(blocks)]
