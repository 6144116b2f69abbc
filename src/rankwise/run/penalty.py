"""Adds the gradient of the orthogonality penalty to ``.grad``, so that it needs no place in the loss.

That makes it independent of how the model is wrapped, called or checkpointed.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.method.penalty import in_blocks, orthogonality_gradients, out_of_blocks
from rankwise.parallel.sharded import gather, local, local_like
from rankwise.parallel.zero import ZeroParts
from rankwise.run.triplets import Triplets

_PENALIZED = (("lora_A", False), ("lora_B", True))  # and whether each triplet is a column there


class AddedPenalty:
    """The penalty of one adapter, whose ``weight`` in the loss adds nothing if it is 0.

    Args:
        triplets: the adapter's.
    """

    def __init__(self, triplets: Triplets) -> None:
        self._triplets, self._blocks = triplets, triplets.layout.block_counts
        # The first gradient that it was added to, and that gradient's version after it.
        self._added_to: tuple[weakref.ref[Tensor], int] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_added_to": None}

    @torch.no_grad()
    def add(self, weight: float, optimizer: Optimizer) -> None:
        """Add it to those A (r, d_in) and B (d_out, r) that have gradients and that ``optimizer`` holds."""
        if not weight:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        penalized = [
            ([(p, n) for p, n in zip(self._triplets.factors(key), self._blocks, strict=True)
              if p.grad is not None and id(p) in held], columns)
            for key, columns in _PENALIZED
        ]  # fmt: skip
        first = next((p.grad for pairs, _ in penalized for p, _ in pairs), None)
        if first is None or self._holds_it(first):
            return
        version, signed = first._version, _signed(weight, optimizer)
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer's gradients are still scaled
        for pairs, columns in penalized:
            if pairs:
                parameters, counts = [p for p, _ in pairs], [n for _, n in pairs]
                added = self._gradients(gather(parameters), counts, columns, signed)
                if scale is not None:
                    torch._foreach_mul_(added, scale)
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_add_(
                    [local(gradient) for gradient in gradients],
                    [local_like(one, gradient) for one, gradient in zip(added, gradients, strict=True)],
                )
        self._added_to = (weakref.ref(first), first._version) if first._version > version else None

    @torch.no_grad()
    def add_to_parts(
        self, weight: float, optimizer: Optimizer, parts: ZeroParts, held: Collection[int]
    ) -> None:
        """As `add`, where DeepSpeed ZeRO steps parts of the adapter in place of its parameters.

        Args:
            weight: of the penalty in the loss.
            optimizer: the one that steps.
            parts: the adapter's A, E and B as DeepSpeed ZeRO holds them.
            held: the numbers among them that are about to step.
        """
        if not weight:
            return
        signed, pieces = _signed(weight, optimizer), list(parts.pieces(optimizer))
        penalized = [(self._triplets.numbers(key), columns) for key, columns in _PENALIZED]
        numbers = [n for each, _ in penalized for n in each if n in held]
        whole = dict(zip(numbers, parts.gathered(numbers, pieces, lambda piece: piece.master), strict=True))
        for each, columns in penalized:
            own = [n for n in each if n in held]
            matrices, counts = [whole[n] for n in own], [self._blocks[each.index(n)] for n in own]
            added = self._gradients(matrices, counts, columns, signed)
            parts.add_to_gradients(pieces, dict(zip(own, added, strict=True)))

    def _gradients(
        self, matrices: Sequence[Tensor], counts: Sequence[int], columns: bool, weight: float
    ) -> list[Tensor]:
        parts = in_blocks(matrices, counts, columns)
        gradients = orthogonality_gradients(parts, columns, weight, 2 * sum(self._blocks))
        return out_of_blocks(gradients, counts, columns)

    def _holds_it(self, gradient: Tensor) -> bool:
        """Whether nothing has changed since the penalty was added, as in an optimizer inside another's step."""
        if self._added_to is None:
            return False
        known, version = self._added_to
        return known() is gradient and gradient._version == version


def _signed(weight: float, optimizer: Optimizer) -> float:
    return -weight if any(group.get("maximize") for group in optimizer.param_groups) else weight
