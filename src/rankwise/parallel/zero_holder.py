"""Access to an adapter's factors under DeepSpeed ZeRO, whose processes each step a part; see `parallel.zero`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.parallel.holder import Measured
from rankwise.parallel.optimizer_state import KINDS
from rankwise.parallel.zero import Piece, ZeroParts


class ZeroHolder:
    """A `Holder` for parameters that ZeRO manages.

    Args:
        parts: the parameters, as ZeRO holds them.
    """

    def __init__(self, parts: ZeroParts) -> None:
        self.parts = parts

    def whole(self, numbers: Sequence[int]) -> list[Tensor]:
        return self.parts.whole(numbers)

    def write(self, values: Mapping[int, Tensor]) -> None:
        self.parts.assign(values)

    def state_names(self, optimizer: Optimizer, numbers: Sequence[int]) -> list[str]:
        own = (name for name in KINDS if self.parts.any(any(True for _ in self._pieces(optimizer, name))))
        return list(own)

    def states(
        self, optimizer: Optimizer, name: str, numbers: Sequence[int], done: set[int]
    ) -> dict[int, Tensor]:
        pieces = self._pieces(optimizer, name)
        whole = self.parts.gathered(numbers, pieces, lambda piece: piece.gradient)
        return dict(zip(numbers, whole, strict=True))

    def write_states(self, optimizer: Optimizer, name: str, values: Mapping[int, Tensor]) -> None:
        for piece in self._pieces(optimizer, name):
            if piece.number in values:
                end = piece.start + piece.gradient.numel()
                piece.gradient.copy_(values[piece.number].reshape(-1)[piece.start : end])

    def _pieces(self, optimizer: Optimizer, name: str) -> list[Piece]:
        return list(self.parts.remembered(optimizer, name))

    def gradients(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """Return nothing: ZeRO steps all parameters of an adapter at once, so no gradient is left to use."""
        return {}

    def write_gradients(self, values: Mapping[int, Tensor]) -> None:
        """Do nothing, as no gradient is left to use."""


class ZeroStep:
    """A step of DeepSpeed on its parts of the parameters; see `rankwise.parallel.holder.Step`.

    Args:
        parts: the parameters, as ZeRO holds them.
        numbers: numbers of the parameters that some process steps now.
        optimizer: the optimizer that steps.
    """

    def __init__(self, parts: ZeroParts, numbers: Sequence[int], optimizer: Optimizer) -> None:
        self._parts, self.numbers, self._optimizer = parts, numbers, optimizer

    @functools.cached_property
    def _pieces(self) -> list[Piece]:
        return list(self._parts.pieces(self._optimizer))

    def has_gradients(self, numbers: Sequence[int]) -> list[bool]:
        """For each of ``numbers``, whether ZeRO steps it. ZeRO fills missing gradients with zeros."""
        return [number in self.numbers for number in numbers]

    def values(self, numbers: Sequence[int]) -> list[Tensor]:
        return self._parts.gathered(numbers, self._pieces, lambda piece: piece.master)

    def products(self, numbers: Sequence[int]) -> list[Tensor | None]:
        stepped = [number for number in numbers if number in self.numbers]
        found = self._parts.gathered(stepped, self._pieces, lambda piece: piece.master * piece.gradient)
        known = dict(zip(stepped, found, strict=True))
        return [known.get(number) for number in numbers]

    def squared_norms(self, measured: Sequence[Measured], device: torch.device) -> Tensor:
        firsts = list(itertools.accumulate((each.blocks for each in measured), initial=0))
        squares = torch.zeros(firsts[-1], dtype=torch.float32, device=device)
        places = {each.number: n for n, each in enumerate(measured) if each.number in self.numbers}
        for piece in self._pieces:
            if piece.number in places:
                n = places[piece.number]
                own = self._by_block(piece, measured[n])
                squares[firsts[n] : firsts[n + 1]] += own.to(device)
        return self._parts.summed(squares)

    def _by_block(self, piece: Piece, measured: Measured) -> Tensor:
        """For a piece of B, the squared norm of each block's gradient in it, (blocks,), float32, on its device."""
        squares = piece.gradient.float().square()
        if measured.blocks == 1:
            return squares.sum().view(1)
        ranks = self._parts.shape(piece.number)[1]
        order = torch.arange(ranks, device="cpu") if measured.order is None else measured.order.cpu()
        block_of = torch.empty(ranks, dtype=torch.int64, device="cpu")
        block_of[order] = torch.arange(ranks, device="cpu") * measured.blocks // ranks
        columns = torch.arange(piece.start, piece.start + len(squares), device="cpu") % ranks
        blocks = block_of[columns].to(squares.device)
        return squares.new_zeros(measured.blocks).index_add_(0, blocks, squares)

    def add_to_gradients(self, added: Mapping[int, Tensor]) -> None:
        self._parts.add_to_gradients(self._pieces, dict(added))
