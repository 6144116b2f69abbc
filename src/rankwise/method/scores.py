"""The importance of every triplet, from running averages of weight times gradient.

Section 3.2 of the AdaLoRA paper (Zhang et al., 2023, https://arxiv.org/abs/2303.10512). For every element w of
A, E and B, with its gradient g:

    importance   I = |w * g|                                           (equation 8)
    sensitivity  S <- beta1 * S + (1 - beta1) * I                      (equation 9)
    uncertainty  U <- beta2 * U + (1 - beta2) * |I - S|                (equation 10, with the new S)

The score of triplet i is S*U at E_i, plus the mean of S*U over row i of A, plus the mean of S*U over column i of B
(equations 7 and 11).

The elements of all layers lie in one flat float32 vector. So a step takes few tensor operations, however many layers
there are, and all computation stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.method.layout import TripletLayout
from rankwise.method.magnitude import largest, power_below

_LEAST, _MOST = 2.0**-30, 2.0**30  # products of averages between these bounds fit into float32


def flatten(matrices: Sequence[Tensor], device: torch.device) -> Tensor:
    """Concatenate matrices into one flat float32 vector on ``device``."""
    return torch.cat(
        [matrix.detach().reshape(-1).to(device=device, dtype=torch.float32) for matrix in matrices]
    )


def update_scores(
    sensitivity: Tensor,
    uncertainty: Tensor,
    importance: Tensor,
    beta1: float,
    beta2: float,
    known: Tensor | None = None,
) -> Tensor:
    """Update the running averages with one optimizer step, in place.

    If any importance is NaN or infinite, the whole step is skipped. So one bad batch cannot spoil the scores.

    Args:
        sensitivity: running mean of the importance, (elements,), float32.
        uncertainty: running mean of its deviation, (elements,), float32.
        importance: weight times gradient, of either sign, (elements,), float32. It is overwritten.
        beta1: decay of the sensitivity, in (0, 1).
        beta2: decay of the uncertainty, in (0, 1).
        known: False for an element without a gradient, whose averages stay, (elements,), bool. None: all are known.

    Returns:
        A 0-dim bool tensor: True if the step counted, False if it was skipped.

    Example:
        >>> s, u = torch.zeros(1), torch.zeros(1)
        >>> update_scores(s, u, torch.tensor([2.0]) * torch.tensor([-1.0]), beta1=0.75, beta2=0.5)
        tensor(True)
        >>> s, u
        (tensor([0.5000]), tensor([0.7500]))
        >>> update_scores(s, u, torch.tensor([torch.nan]), beta1=0.75, beta2=0.5), s
        (tensor(False), tensor([0.5000]))
    """
    importance.abs_()
    # This tests the largest number, because the sum may overflow where every number is finite.
    counted = importance.amax().isfinite() if importance.numel() else importance.sum().isfinite()
    importance.masked_fill_(~counted, 0.0)  # NaN times a weight of 0 would still be NaN
    moves = counted if known is None else counted & known
    sensitivity.lerp_(importance, moves.to(sensitivity.dtype) * (1 - beta1))
    uncertainty.lerp_(importance.sub_(sensitivity).abs_(), moves.to(uncertainty.dtype) * (1 - beta2))
    return counted


def triplet_scores(layout: TripletLayout, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
    """One score per triplet, (triplets,), from the running averages, (elements,).

    If the averages of one kind are so large or so small that products would overflow or vanish, all of that kind are
    divided by one power of two. The order of the scores stays, and only the order is used.
    """
    return layout.mean_per_triplet(_of_usual_size(sensitivity) * _of_usual_size(uncertainty))


def _of_usual_size(averages: Tensor) -> Tensor:
    if not averages.numel():
        return averages
    power = power_below(largest(averages, (0,)))
    return averages / torch.where((power > _LEAST) & (power < _MOST), torch.ones_like(power), power)
