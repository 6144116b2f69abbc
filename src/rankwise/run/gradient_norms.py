"""How large the gradients of every block were so far: what its movement does for the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.parallel.sharded import squared_norms
from rankwise.parallel.zero import Piece, ZeroParts
from rankwise.run.triplets import Triplets
from rankwise.run.watch import Watch


class GradientNorms(Watch):
    """Sums up, for every block, the norm of its gradient in each step: the root mean square over its acting triplets.

    It is the gradient of the factor that starts at 0 and carries the update (B, or A in embeddings). The sums are the
    buffer ``sensitivity``, (blocks,). Steps with NaN or infinite gradients are left out.

    Args:
        triplets: the adapter's.
        tell: says something to the user, once.
    """

    decisive = "lora_B"

    def __init__(self, triplets: Triplets, tell: Callable[[str], None]) -> None:
        super().__init__(triplets, tell)
        self.entries = len(triplets.layout.block_ranks)
        self._keys = [layer.starts_at_zero for layer in triplets.layers.values()]

    def per_triplet(self) -> Tensor:
        """The sum of each triplet's block, (triplets,), float32; 1 everywhere while there is none."""
        sums = self._triplets.buffer("sensitivity")
        return self._triplets.spread(torch.where(sums.any(), sums, 1.0))

    def update(self, step: int) -> None:
        factors = {key: self._triplets.factors(key) for key in set(self._keys)}
        gradients = self._gradients([factors[key][n] for n, key in enumerate(self._keys)])
        if any(gradient is not None for gradient in gradients):
            counts = self._triplets.layout.block_counts
            self._add(squared_norms(gradients, counts, self._triplets.mask.device), step)

    def update_from_parts(
        self, parts: ZeroParts, held: frozenset[int], optimizer: Optimizer, step: int
    ) -> None:
        layout = self._triplets.layout
        squares = torch.zeros(self.entries, device=self._triplets.mask.device)
        firsts = list(itertools.accumulate(layout.block_counts, initial=0))
        places = {self._triplets.numbers(key)[n]: n for n, key in enumerate(self._keys)}
        for piece in parts.pieces(optimizer):
            n = places.get(piece.number) if piece.number in held else None
            if n is not None:
                blocks, first = layout.block_counts[n], firsts[n]
                of_blocks = _by_block(piece, layout.ranks[n], blocks)
                squares[first : first + blocks] += of_blocks.to(squares.device)
        self._add(parts.summed(squares), step)

    def _add(self, squares: Tensor, step: int) -> None:
        """Take in the squared norms of all blocks, (blocks,), float32."""
        finite = squares.isfinite().all()
        norms = (squares / self._triplets.ranks().clamp_min(1)).sqrt()
        self._triplets.buffer("sensitivity").add_(torch.where(finite, norms, 0.0))
        self._count(finite, step)


def _by_block(piece: Piece, rank: int, blocks: int) -> Tensor:
    """The squared norms of the parts of blocks that are in a piece of a factor, (blocks,), float32.

    It may be in the memory of the CPU, where DeepSpeed keeps its optimizer.
    """
    squares = piece.gradient.float().square()
    if blocks == 1:
        return squares.sum().view(1)
    columns = torch.arange(piece.start, piece.start + len(squares), device=squares.device) % rank
    return squares.new_zeros(blocks).index_add_(0, columns * blocks // rank, squares)
