"""Adds the gradient of the orthogonality penalty to ``.grad``, so that it needs no place in the loss.

That makes it independent of how the model is wrapped, called or checkpointed.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.method.penalty import orthogonality_gradients
from rankwise.parallel.sharded import gather, local, local_like
from rankwise.parallel.zero import ZeroParts


class AddedPenalty:
    """The penalty of one adapter, whose ``weight`` in the loss adds nothing if it is 0.

    Args:
        layers: how many layers are adapted.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        # The first gradient that it was added to, and that gradient's version after it.
        self._added_to: tuple[weakref.ref[Tensor], int] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_added_to": None}

    @torch.no_grad()
    def add(
        self, weight: float, optimizer: Optimizer, A: Sequence[nn.Parameter], B: Sequence[nn.Parameter]
    ) -> None:
        """Add it to those A (r, d_in) and B (d_out, r) that have gradients and that ``optimizer`` holds."""
        if not weight:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        penalized = [
            ([p for p in factors if p.grad is not None and id(p) in held], columns)
            for factors, columns in ((A, False), (B, True))
        ]
        first = next((p.grad for parameters, _ in penalized for p in parameters), None)
        if first is None or self._holds_it(first):
            return
        version, signed = first._version, _signed(weight, optimizer)
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer's gradients are still scaled
        for parameters, columns in penalized:
            if parameters:
                added = orthogonality_gradients(gather(parameters), columns, signed, 2 * self._layers)
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
            parts: all A, then all E, then all B.
            held: the numbers among them that are about to step.
        """
        if not weight:
            return
        layers, signed = self._layers, _signed(weight, optimizer)
        numbers = [n for n in sorted(held) if not layers <= n < 2 * layers]  # A and B
        pieces = list(parts.pieces(optimizer))
        whole = dict(zip(numbers, parts.gathered(numbers, pieces, lambda piece: piece.master), strict=True))
        for columns in (False, True):
            own = [number for number in numbers if (number >= 2 * layers) == columns]
            matrices = [whole[number] for number in own]
            added = orthogonality_gradients(matrices, columns, signed, 2 * layers)
            parts.add_to_gradients(pieces, dict(zip(own, added, strict=True)))

    def _holds_it(self, gradient: Tensor) -> bool:
        """Whether nothing has changed since the penalty was added, as in an optimizer inside another's step."""
        if self._added_to is None:
            return False
        known, version = self._added_to
        return known() is gradient and gradient._version == version


def _signed(weight: float, optimizer: Optimizer) -> float:
    return -weight if any(group.get("maximize") for group in optimizer.param_groups) else weight
