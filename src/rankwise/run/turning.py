"""Turning an adapter's layers into their principal directions, wherever its factors and an optimizer's moments are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.method.principal import Principal, principal_directions
from rankwise.parallel.sharded import gather, local, local_like
from rankwise.parallel.zero import ZeroParts
from rankwise.run.moments import Turn, turn_moments, turn_moments_of_parts
from rankwise.run.triplets import Triplets


class _Group(NamedTuple):
    """Blocks of one shape, which are turned in one batch."""

    places: list[int]  # numbers of the layers, each with all its blocks
    swapped: bool  # LoRA starts with A = 0, as in embeddings: then A and B change parts
    found: Principal

    def parts(self, count: int) -> Iterator[tuple[int, Principal]]:
        """Each layer's number with its own ``count`` blocks."""
        pieces = zip(*(values.split(count) for values in self.found), strict=True)
        for n, own in zip(self.places, pieces, strict=True):
            yield n, Principal(*own)


class Turned:
    """All layers that train, in their principal directions: found, but not put into the model yet.

    Args:
        triplets: the adapter's.
        parts: its A, E and B as DeepSpeed ZeRO holds them, if it does.
    """

    def __init__(self, triplets: Triplets, parts: ZeroParts | None) -> None:
        self._triplets, self._parts = triplets, parts
        self._blocks = [layer.blocks(layer) for layer in triplets.layers.values()]
        self._whole_A, self._whole_B = _whole_factors(triplets, parts)
        self._acted = list(triplets.mask.split(triplets.layout.ranks))
        self._groups = list(self._look())

    def _look(self) -> Iterator[_Group]:
        swapped = [layer.starts_at_zero == "lora_A" for layer in self._triplets.layers.values()]
        alike: dict[tuple[object, ...], list[int]] = {}
        trains = [
            A.requires_grad and B.requires_grad
            for A, B in zip(*map(self._triplets.factors, ("lora_A", "lora_B")), strict=True)
        ]
        for n, (A, B) in enumerate(zip(self._whole_A, self._whole_B, strict=True)):
            if trains[n] and len(A):
                key = (A.shape, B.shape, self._blocks[n], A.device, swapped[n])
                alike.setdefault(key, []).append(n)
        for places in alike.values():
            count, swaps = self._blocks[places[0]], swapped[places[0]]
            A = torch.cat([_in_blocks(_wide(self._whole_A[n]), count) for n in places])
            B = torch.cat([_in_blocks(_wide(self._whole_B[n]).T, count).mT for n in places])
            acts = torch.cat([self._acted[n].view(count, -1) for n in places]).to(A.device)
            yield _Group(places, swaps, principal_directions(*((B.mT, A.mT) if swaps else (A, B)), acts))

    def strengths(self) -> Tensor:
        """The norm of each triplet's part of ``B A``, (triplets,): a singular value, where a layer is turned."""
        device = self._triplets.mask.device
        found = [
            _wide(A).norm(dim=1).to(device) * _wide(B).norm(dim=0).to(device) * acts
            for A, B, acts in zip(self._whole_A, self._whole_B, self._acted, strict=True)
        ]
        for n, part in self._found():
            found[n] = part.strengths.flatten().to(device)
        return torch.cat(found)

    def acts(self) -> Tensor:
        """Which triplets act once all is turned, (triplets,), bool: in a block that is turned, the first ones."""
        acts = list(self._acted)
        for n, part in self._found():
            blocks = acts[n].view(self._blocks[n], -1)
            first = torch.arange(blocks.shape[1], device=blocks.device) < blocks.sum(1, keepdim=True)
            acts[n] = torch.where(part.finite.to(blocks.device)[:, None], first, blocks).flatten()
        return torch.cat(acts)

    def _found(self) -> Iterator[tuple[int, Principal]]:
        for group in self._groups:
            yield from group.parts(self._blocks[group.places[0]])

    def put_in(self, louder: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Turn the factors in the model, and what optimizers remember of them; the update stays as it is.

        Args:
            louder: what E is multiplied by at the same time, (triplets,); columns of B are divided by it.
            optimizers: those that may train any of the adapter.
        """
        A, B, turns_A, turns_B = self._by_layer()
        for n, (whole, by) in enumerate(
            zip(self._whole_B, louder.split(self._triplets.layout.ranks), strict=True)
        ):
            by = by.to(whole.device, _wide(whole).dtype)
            B[n] = B.get(n, _wide(whole)) / by
            scale = by.view(self._blocks[n], -1)[:, :, None]  # of rows
            same = torch.eye(scale.shape[1], device=by.device, dtype=by.dtype).expand(len(scale), -1, -1)
            turn = turns_B.get(n, Turn(same, same))
            turns_B[n] = Turn(turn.weight / scale, turn.gradient * scale)
        self._write(A, "lora_A")
        self._write(B, "lora_B")
        self._move(turns_A, "lora_A", optimizers, columns=False)
        self._move(turns_B, "lora_B", optimizers, columns=True)

    def _by_layer(self) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Turn], dict[int, Turn]]:
        """New A and B of the layers that are turned, by number, and how each is turned."""
        A, B, turns_A, turns_B = {}, {}, {}, {}
        for group in self._groups:
            for n, part in group.parts(self._blocks[group.places[0]]):
                A[n], B[n] = part.A.flatten(0, 1), part.B.mT.flatten(0, 1).T
                turns_A[n], turns_B[n] = Turn(part.turn, part.inverse.mT), Turn(part.inverse.mT, part.turn)
                if group.swapped:
                    A[n], B[n] = B[n].T, A[n].T
                    turns_A[n], turns_B[n] = turns_B[n], turns_A[n]
        return A, B, turns_A, turns_B

    def _write(self, values: Mapping[int, Tensor], key: str) -> None:
        if self._parts is not None:
            numbers = self._triplets.numbers(key)
            self._parts.assign({numbers[n]: value for n, value in values.items()})
            return
        parameters = self._triplets.factors(key)
        for n, value in values.items():
            local(parameters[n]).copy_(local_like(value, parameters[n]))

    def _move(
        self, turns: Mapping[int, Turn], key: str, optimizers: Iterable[Optimizer], columns: bool
    ) -> None:
        if self._parts is not None:
            numbers = self._triplets.numbers(key)
            of_parts = {numbers[n]: turn for n, turn in turns.items()}
            turn_moments_of_parts(optimizers, self._parts, of_parts, columns)
        else:
            parameters = self._triplets.factors(key)
            turn_moments(optimizers, [parameters[n] for n in turns], list(turns.values()), columns)


def mean_strengths(triplets: Triplets, parts: ZeroParts | None) -> Tensor:
    """The root mean square of the strengths of the triplets that act in each block, (triplets,); 0 where none does.

    It takes no decomposition: the sum of their squares is the squared norm of B A. Arguments are as for `Turned`.
    Where factors are not finite it is 0, too.
    """
    device, found = triplets.mask.device, []
    acting = triplets.mask.split(triplets.layout.ranks)
    for A, B, acts, layer in zip(
        *_whole_factors(triplets, parts), acting, triplets.layers.values(), strict=True
    ):
        rows, columns = (
            _in_blocks(_wide(each).masked_fill(~acts.to(each.device)[:, None], 0), layer.blocks(layer))
            for each in (A, B.T)
        )
        found.append(((rows @ rows.mT) * (columns @ columns.mT)).sum((1, 2)).to(device))
    sums = torch.cat(found).clamp_min(0).nan_to_num(0.0, posinf=0.0)
    return triplets.spread((sums / triplets.ranks().clamp_min(1)).sqrt()) * triplets.mask


def _whole_factors(triplets: Triplets, parts: ZeroParts | None) -> tuple[list[Tensor], list[Tensor]]:
    """All A and all B, in layer order."""
    if parts is not None:
        return parts.whole(triplets.numbers("lora_A")), parts.whole(triplets.numbers("lora_B"))
    return gather(triplets.factors("lora_A")), gather(triplets.factors("lora_B"))


def _in_blocks(rows: Tensor, count: int) -> Tensor:
    """(n r, d) -> (n, r, d)."""
    return rows.reshape(count, rows.shape[0] // count, rows.shape[1])


def _wide(matrix: Tensor) -> Tensor:
    return matrix.detach() if matrix.element_size() >= 4 else matrix.detach().float()
