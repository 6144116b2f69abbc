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


class _Group(NamedTuple):
    """Layers of one shape, which are decomposed in one batch.

    Args:
        layers: the layers' indices. All these layers have the same number of blocks.
        blocks: the number of blocks in each layer.
        swapped: whether A and B swap roles, because the layers start with A = 0, as embeddings do.
        found: the principal bases of all blocks.
    """

    layers: list[int]
    blocks: int
    swapped: bool
    found: Principal

    def by_layer(self) -> Iterator[tuple[int, Principal]]:
        """Yield each layer's index with the bases of its own blocks."""
        pieces = zip(*(values.split(self.blocks) for values in self.found), strict=True)
        for n, own in zip(self.layers, pieces, strict=True):
            yield n, Principal(*own)


class PrincipalBases:
    """The principal bases of all layers whose A and B both train. `write` writes them into the layers.

    Args:
        factors: the factors of the run.
    """

    def __init__(self, factors: Factors) -> None:
        self._factors = factors
        self._A, self._B = factors.rows("A"), factors.rows("B")
        self._acted = list(factors.mask.split(factors.layout.ranks))
        self._groups = list(self._decompose())

    def _decompose(self) -> Iterator[_Group]:
        trains = [a and b for a, b in zip(*map(self._factors.trains, "AB"), strict=True)]
        alike: dict[tuple[object, ...], list[int]] = {}
        for n, (A, B, pair) in enumerate(zip(self._A, self._B, self._factors.pairs, strict=True)):
            if trains[n] and len(A):
                key = (A.shape, B.shape, pair.blocks, A.device, A.dtype, pair.starts_at_zero)
                alike.setdefault(key, []).append(n)
        for layers in alike.values():
            pair = self._factors.pairs[layers[0]]
            swapped = pair.starts_at_zero == "A"
            A = torch.cat([_in_blocks(self._A[n], pair.blocks) for n in layers])
            B = torch.cat([_in_blocks(self._B[n], pair.blocks) for n in layers])
            acts = torch.cat([self._acted[n].view(pair.blocks, -1) for n in layers]).to(A.device)
            found = principal_directions(*((B, A.mT) if swapped else (A, B.mT)), acts)
            yield _Group(layers, pair.blocks, swapped, found)

    def _by_layer(self) -> Iterator[tuple[int, Principal]]:
        for group in self._groups:
            yield from group.by_layer()

    def strengths(self) -> Tensor:
        """The norm of each rank's part of ``B A``, (ranks,): a singular value in layers that were decomposed."""
        device = self._factors.mask.device
        found = {n: part.strengths.flatten().to(device) for n, part in self._by_layer()}
        for n, (A, B, acts) in enumerate(zip(self._A, self._B, self._acted, strict=True)):
            if n not in found:
                found[n] = A.norm(dim=1).to(device) * B.norm(dim=1).to(device) * acts
        return torch.cat([found[n] for n in range(len(self._A))])

    def acts(self) -> Tensor:
        """The ranks that are on in the new bases, (ranks,), bool: the first ones of each decomposed block."""
        acts = list(self._acted)
        for n, part in self._by_layer():
            blocks = acts[n].view(len(part.finite), -1)
            first = torch.arange(blocks.shape[1], device=blocks.device) < blocks.sum(1, keepdim=True)
            acts[n] = torch.where(part.finite.to(blocks.device)[:, None], first, blocks).flatten()
        return torch.cat(acts)

    def off_ones_moved(self) -> bool:
        """Whether any rank that was switched off is no longer 0."""
        moved = [
            (rows[~acted.to(rows.device)] != 0).any().to(self._factors.mask.device)
            for factor in (self._A, self._B)
            for rows, acted in zip(factor, self._acted, strict=True)
        ]
        return bool(torch.stack(moved).any())

    def undecomposed(self) -> list[int]:
        """The indices of the layers that could not be decomposed because they hold NaN or infinite values."""
        found = []
        for group in self._groups:  # each waits for the device once
            whole = group.found.finite.view(-1, group.blocks).all(1).tolist()
            found += [n for n, finite in zip(group.layers, whole, strict=True) if not finite]
        return found

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
        A, B = dict(enumerate(self._A)), dict(enumerate(self._B))
        decomposed = {n for group in self._groups for n in group.layers}
        changes_A = self._unchanged(n for n in louder if n not in decomposed)
        changes_B = dict(changes_A)
        for group in self._groups:
            for n, part in group.by_layer():
                A[n], B[n] = part.A.flatten(0, 1), part.B.mT.flatten(0, 1)
                changes_A[n] = BasisChange(part.turn, part.inverse.mT)
                changes_B[n] = BasisChange(part.inverse.mT, part.turn)
                if group.swapped:
                    A[n], B[n] = B[n], A[n]
                    changes_A[n], changes_B[n] = changes_B[n], changes_A[n]
        by_layer = kept.split(self._factors.layout.ranks)
        stays = {n: by_layer[n].to(A[n].device)[:, None] for n in louder}
        self._factors.write_rows("A", {n: torch.where(stays[n], A[n], 0.0) for n in louder})
        self._factors.write_rows("B", {n: torch.where(stays[n], B[n] / by, 0.0) for n, by in louder.items()})
        changes_A = {n: changes_A[n].cut(stays[n]) for n in louder}
        changes_B = {n: changes_B[n].scaled(1 / by).cut(stays[n]) for n, by in louder.items()}
        rewrite_memory(self._factors, "A", changes_A, optimizers)
        rewrite_memory(self._factors, "B", changes_B, optimizers)

    def _unchanged(self, layers: Iterable[int]) -> dict[int, BasisChange]:
        changes = {}
        for n in layers:
            A, blocks = self._A[n], self._factors.pairs[n].blocks
            size = len(A) // blocks
            same = torch.eye(size, device=A.device, dtype=A.dtype).expand(blocks, -1, -1)
            changes[n] = BasisChange(same, same)
        return changes


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
            rows = _in_blocks(each.masked_fill(~acts.to(each.device)[:, None], 0), pair.blocks)
            power = power_below(
                largest(rows, (1, 2))
            )  # a power of two, so that products don't over- or underflow
            rows = rows / power
            products.append(rows @ rows.mT)
            sizes.append(power.flatten())
        norms = (products[0] * products[1]).sum((1, 2)).clamp_min(0).sqrt() * sizes[0] * sizes[1]
        found.append(norms.nan_to_num(0.0).to(device))
    counts = factors.block_ranks().clamp_min(1)
    return factors.spread(torch.cat(found) / counts.sqrt()) * factors.mask


def _in_blocks(rows: Tensor, count: int) -> Tensor:
    """Split rows into blocks: (n r, d) -> (n, r, d)."""
    return rows.reshape(count, rows.shape[0] // count, rows.shape[1])
