"""A layer's update in its principal directions: the same product, in factors whose triplets are singular triplets.

From a LoRA start all columns of B follow nearly one direction (``b_i`` follows ``G a_i``), so an update is of much
lower rank than the triplets that carry it, and whichever triplet is cut takes an equal share along. In the basis of
singular vectors the smallest directions carry next to nothing. With the thin QR decompositions ``A^T = Q_A R_A`` and
``B = Q_B R_B`` and the singular value decomposition ``R_B R_A^T = U S V^T`` of an r x r matrix,

    A' = c (Q_A V)^T        B' = Q_B U S / c        B' A' = B A

where c is the root mean square of the norms of A's rows, so that the adapter goes on learning at the pace it had.

Since ``A' = M A`` and ``B' = B M^-1`` with ``M = c V^T R_A^-T``, what an optimizer remembers moves along: gradients and
their means as ``M^-T`` times those of A and ``M^T`` times those of B, means of squares by the squares of the entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_RELATIVE = 1e-6  # singular values of R_A below this share of the largest count as 0


class Principal(NamedTuple):
    """n layers of one shape in their principal directions, the strongest first.

    Args:
        A: (n, r, d_in), rows orthogonal and of one norm in each layer.
        B: (n, d_out, r), columns orthogonal.
        strengths: (n, r), the singular values of ``B A``, falling.
        turn: (n, r, r), M with ``A' = M A``.
        inverse: (n, r, r), ``M^-1``, with ``B' = B M^-1``.
        finite: (n,), bool: False for a layer that is as it was, as its values or strengths are not finite.
    """

    A: Tensor
    B: Tensor
    strengths: Tensor
    turn: Tensor
    inverse: Tensor
    finite: Tensor


def principal_directions(A: Tensor, B: Tensor, acts: Tensor) -> Principal:
    """Turn the factors of n layers of one shape into their principal directions.

    A triplet that does not act takes no part: as many directions as act come first, and the others are 0. A layer
    stays as it is, with strengths of 0, if its values or the strengths are not finite.

    Args:
        A: (n, r, d_in), float32 or float64.
        B: (n, d_out, r), as A.
        acts: (n, r), bool.

    Example:
        >>> A, B = torch.randn(1, 2, 5), torch.randn(1, 3, 2)
        >>> turned = principal_directions(A, B, torch.ones(1, 2, dtype=torch.bool))
        >>> torch.allclose(turned.B @ turned.A, B @ A, atol=1e-5)
        True
        >>> torch.allclose(turned.strengths, torch.linalg.svdvals(B @ A)[:, :2], atol=1e-5)
        True
    """
    rank = A.shape[1]
    finite = A.isfinite().flatten(1).all(1) & B.isfinite().flatten(1).all(1)
    takes_part = (acts & finite[:, None]).to(A.dtype)
    a, b = _zero_where(A, takes_part[:, :, None]), _zero_where(B, takes_part[:, None, :])
    (a, size_A), (b, size_B) = _of_size_one(a), _of_size_one(b)  # products of large values could overflow
    norm = (a.square().sum((1, 2)) / takes_part.sum(1).clamp_min(1)).sqrt()[:, None, None]
    Q_A, R_A = torch.linalg.qr(a.mT)
    Q_B, R_B = torch.linalg.qr(b)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    # There are fewer than r where a width is smaller than that.
    S, U, Vh = _padded(S, rank, 1), _padded(U, rank, 2), _padded(Vh, rank, 1)
    order = torch.arange(rank, device=A.device)
    leads = (order < takes_part.sum(1, keepdim=True)).to(A.dtype)  # as many directions as there are triplets
    S, Vh = S * leads, Vh * leads[:, :, None]
    safe = torch.where(norm > 0, norm, 1.0)
    turned_A, turned_B = size_A * norm * (Vh @ Q_A.mT), size_B * (Q_B @ U) * (S[:, None, :] / safe)
    turn = norm * (Vh @ torch.linalg.pinv(R_A, rtol=_RELATIVE).mT)
    inverse = (R_A.mT @ Vh.mT) / safe
    strengths = S * (size_A * size_B)[:, :, 0]
    finite = finite & strengths.isfinite().all(1)
    keep = finite[:, None, None]
    eye = torch.eye(rank, dtype=A.dtype, device=A.device).expand_as(turn)
    return Principal(
        torch.where(keep, turned_A, A),
        torch.where(keep, turned_B, B),
        torch.where(finite[:, None], strengths, torch.zeros_like(S)),
        torch.where(keep, turn, eye),
        torch.where(keep, inverse, eye),
        finite,
    )


def _zero_where(values: Tensor, takes_part: Tensor) -> Tensor:
    return torch.where(takes_part > 0, values, torch.zeros_like(values))


def _of_size_one(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n, ., .) -> the same with a largest value between 1/2 and 1, and the power of 2 by which it was divided."""
    exponent = torch.frexp(values.abs().amax((1, 2), keepdim=True)).exponent
    return torch.ldexp(values, -exponent), torch.ldexp(torch.ones_like(values[:, :1, :1]), exponent)


def _padded(values: Tensor, size: int, dim: int) -> Tensor:
    missing = size - values.shape[dim]
    if not missing:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim)
