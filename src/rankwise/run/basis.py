"""Rewrites the layers of a run in their principal bases, and switches ranks off there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.method.magnitude import largest, power_below
from rankwise.method.principal import Principal, principal_directions
from rankwise.run.factors import Factors
from rankwise.run.moments import BasisChange, rewrite_memory
from rankwise.run.pairs import KEYS


class _Group(NamedTuple):
    """Layers of one shape, which are computed in one batch of n blocks.

    Args:
        layers: the layers' indices. All these layers have the same number of blocks.
        decomposes: whether the layers have ranks and both A and B train. Other layers keep their basis.
        swapped: whether A and B swap roles, because the layers start with A = 0, as embeddings do.
        acted: the ranks that are on, (n, r), bool.
        moved: the ranks that are not 0 in A or B, (n, r), bool.
        found: the bases of all blocks.
    """

    layers: list[int]
    decomposes: bool
    swapped: bool
    acted: Tensor
    moved: Tensor
    found: Principal

    def by_layer(self, values: Tensor) -> Iterable[tuple[int, Tensor]]:
        """Pair each layer's index with its part of ``values``, (n, r, ...), as (ranks, ...)."""
        blocks, rank = len(values) // len(self.layers), values.shape[1]
        parts = values.reshape(len(self.layers), blocks * rank, *values.shape[2:]).unbind()
        return zip(self.layers, parts, strict=True)

    def acts(self) -> Tensor:
        """The ranks that are on in the new bases, (n, r), bool: the first ones of each decomposed block."""
        places = torch.arange(self.acted.shape[1], device=self.acted.device)
        first = places < self.acted.sum(1, keepdim=True)
        return torch.where(self.found.finite[:, None], first, self.acted)

    def turned(self) -> tuple[tuple[Tensor, BasisChange], tuple[Tensor, BasisChange]]:
        """The rows of A and of B in the new bases, each with its change of basis."""
        turn, inverse = self.found.turn, self.found.inverse.mT
        first = self.found.A, BasisChange(turn, inverse)
        second = self.found.B.mT, BasisChange(inverse, turn)
        return (second, first) if self.swapped else (first, second)


class PrincipalBases:
    """The principal bases of all layers whose A and B both train. `write` writes them into the layers.

    The number of tensor operations depends on the number of different shapes, and not on the number of layers.

    Args:
        factors: the factors of the run.
    """

    def __init__(self, factors: Factors) -> None:
        self._factors = factors
        self._groups = list(self._grouped())

    def _grouped(self) -> Iterator[_Group]:
        all_A, all_B = self._factors.rows("A"), self._factors.rows("B")
        trains = [a and b for a, b in zip(*map(self._factors.trains, "AB"), strict=True)]
        acted = self._factors.mask.split(self._factors.layout.ranks)
        alike: dict[tuple[object, ...], list[int]] = {}
        for n, (A, B, pair) in enumerate(zip(all_A, all_B, self._factors.pairs, strict=True)):
            key = (A.shape, B.shape, pair.blocks, A.device, A.dtype, pair.starts_at_zero, trains[n])
            alike.setdefault(key, []).append(n)
        for layers in alike.values():
            pair = self._factors.pairs[layers[0]]
            swapped = pair.starts_at_zero == "A"
            A, B = (_in_blocks([rows[n] for n in layers], pair.blocks) for rows in (all_A, all_B))
            acts = _in_blocks([acted[n] for n in layers], pair.blocks).to(A.device)
            first, second = (B, A) if swapped else (A, B)
            decomposes = trains[layers[0]] and A.shape[1] > 0
            found = (principal_directions if decomposes else _unchanged)(first, second.mT, acts)
            moved = (A != 0).any(2) | (B != 0).any(2)
            yield _Group(layers, decomposes, swapped, acts, moved, found)

    def _in_order(self, values: Iterable[Tensor]) -> Tensor:
        """Put the groups' values, each (n, r), into the order of the run's ranks, (ranks,)."""
        device = self._factors.mask.device
        parts: dict[int, Tensor] = {}
        for group, own in zip(self._groups, values, strict=True):
            parts.update(group.by_layer(own.to(device)))
        return torch.cat([parts[n] for n in range(len(parts))])

    def strengths(self) -> Tensor:
        """The norm of each rank's part of ``B A``, (ranks,): a singular value in layers that were decomposed."""
        return self._in_order(group.found.strengths for group in self._groups)

    def acts(self) -> Tensor:
        """The ranks that are on in the new bases, (ranks,), bool: the first ones of each decomposed block."""
        return self._in_order(group.acts() for group in self._groups)

    def off_ones_moved(self) -> bool:
        """Whether any rank that was switched off is no longer 0."""
        moved = [(group.moved & ~group.acted).any().to(self._factors.mask.device) for group in self._groups]
        return bool(torch.stack(moved).any())

    def undecomposed(self) -> list[int]:
        """The indices of the layers that could not be decomposed because they hold NaN or infinite values."""
        found = []
        for group in self._groups:  # each waits for the device once
            if group.decomposes:
                whole = group.found.finite.view(len(group.layers), -1).all(1).tolist()
                found += [n for n, finite in zip(group.layers, whole, strict=True) if not finite]
        return sorted(found)

    def write(self, kept: Tensor, louder: Mapping[int, float], optimizers: Sequence[Optimizer]) -> None:
        """Write the bases into the layers, with 0 in A and B for every rank that is not ``kept``.

        Pending gradients and the state of optimizers are rewritten, too. If all ranks are kept, the layers' updates
        do not change.

        Args:
            kept: the ranks to keep, (ranks,), bool.
            louder: for the index of each layer to write, the factor by which its scale grows at the same time. B is
                divided by it. Layers that are not named stay as they are.
            optimizers: the optimizers that may train any of the factors.
        """
        kept_of, written = kept.split(self._factors.layout.ranks), list(louder)
        rows: dict[str, dict[int, Tensor]] = {key: {} for key in KEYS}
        changes: dict[str, list[tuple[list[int], BasisChange]]] = {key: [] for key in KEYS}
        for group in self._groups:
            (A, change_A), (B, change_B) = group.turned()
            blocks = len(A) // len(group.layers)
            stays = _in_blocks([kept_of[n] for n in group.layers], blocks).to(A.device)[:, :, None]
            each = [louder.get(n, 1.0) for n in group.layers for _ in range(blocks)]
            by = torch.tensor(each, dtype=A.dtype, device=A.device)[:, None, None]
            new = {"A": (A, change_A), "B": (B / by, change_B.scaled(1 / by))}
            for key, (values, change) in new.items():
                rows[key].update(group.by_layer(torch.where(stays, values, 0.0)))
                changes[key].append((group.layers, change.cut(stays)))
        for key in KEYS:
            self._factors.write_rows(key, {n: rows[key][n] for n in written})
        for key in KEYS:
            rewrite_memory(self._factors, key, written, changes[key], optimizers)


def _unchanged(A: Tensor, B: Tensor, acts: Tensor) -> Principal:
    """The bases of layers that keep the one they have, for the arguments of `principal_directions`."""
    same = torch.eye(A.shape[1], device=A.device, dtype=A.dtype).expand(len(A), -1, -1)
    strengths = A.norm(dim=2) * B.norm(dim=1) * acts
    return Principal(A, B, strengths, same, same, acts.new_zeros(len(A)))


def mean_strengths(factors: Factors) -> Tensor:
    """The root mean square of the strengths of the ranks that are on in each block, (ranks,).

    No decomposition is needed: the sum of the squared strengths is the squared norm of B A. The result is 0 for ranks
    that are off and for factors that are not finite. It is at most the largest finite number of its dtype.
    """
    device, found = factors.mask.device, []
    acting = factors.mask.split(factors.layout.ranks)
    for A, B, acts, pair in zip(factors.rows("A"), factors.rows("B"), acting, factors.pairs, strict=True):
        products, sizes = [], []
        for each in (A, B):
            rows = _in_blocks([each.masked_fill(~acts.to(each.device)[:, None], 0)], pair.blocks)
            # a power of two, so that products don't over- or underflow
            power = power_below(largest(rows, (1, 2)))
            rows = rows / power
            products.append(rows @ rows.mT)
            sizes.append(power.flatten())
        norms = (products[0] * products[1]).sum((1, 2)).clamp_min(0).sqrt() * sizes[0] * sizes[1]
        found.append(norms.nan_to_num(0.0).to(device))
    counts = factors.block_ranks().clamp_min(1)
    return factors.spread(torch.cat(found) / counts.sqrt()) * factors.mask


def _in_blocks(layers: Sequence[Tensor], blocks: int) -> Tensor:
    """Stack layers of one shape, (ranks, ...), and split their ranks into blocks: (n, r, ...)."""
    stacked = torch.stack(list(layers))
    count, ranks, *widths = stacked.shape
    return stacked.view(count * blocks, ranks // blocks, *widths)
