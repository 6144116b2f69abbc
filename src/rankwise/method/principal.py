"""A layer's update in its principal directions: the product B A stays, and its triplets become singular triplets.

From a LoRA start all columns of B follow nearly one direction (``b_i`` follows ``G a_i``). The update then has a much
lower rank than the number of its triplets, and every triplet holds an equal share of it. Cutting any triplet loses that
share. In the basis of singular vectors the smallest directions hold next to nothing, and cutting them loses little.

With the thin QR decompositions ``A^T = Q_A R_A`` and ``B = Q_B R_B`` and the singular value decomposition
``R_B R_A^T = U S V^T`` of an r x r matrix,

    A' = c (Q_A V)^T        B' = Q_B U S / c        B' A' = B A

where c is the root mean square of the norms of A's rows. This c keeps the pace at which the adapter learns.

The new factors are ``A' = M A`` and ``B' = B M^-1`` with ``M = c V^T R_A^-T``. The optimizer's state follows. Gradients
of A and their means are multiplied by ``M^-T`` from the left, those of B by ``M^T`` from the right. Means of squared
gradients are multiplied by the squared entries of the same matrices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.method.magnitude import largest, power_below

_RELATIVE = 1e-6  # singular values of R_A below this share of the largest count as 0


class Principal(NamedTuple):
    """The principal directions of n layers of one shape, the strongest first.

    Where ``finite`` is False the layer is unchanged: A and B are those that were given, and M is the identity.

    Args:
        A: (n, r, d_in), rows orthogonal and of one norm in each layer.
        B: (n, d_out, r), columns orthogonal.
        strengths: (n, r), the singular values of ``B A`` in descending order, at most the largest finite number. For an
            unchanged layer: ``|b_i| |a_i|`` of each acting triplet, or 0 if the layer holds NaN or infinite values.
        turn: (n, r, r), M with ``A' = M A``.
        inverse: (n, r, r), ``M^-1``, with ``B' = B M^-1``.
        finite: (n,), bool. False for a layer that is unchanged because it holds NaN or infinite values, or because
            its principal directions have numbers beyond the range of the dtype.
    """

    A: Tensor
    B: Tensor
    strengths: Tensor
    turn: Tensor
    inverse: Tensor
    finite: Tensor


def principal_directions(A: Tensor, B: Tensor, acts: Tensor) -> Principal:
    """Rotate the factors of n layers of one shape into their principal directions.

    Triplets that do not act are ignored. The result has as many directions as triplets that act; they come first, and
    the others are 0. A layer that cannot be rotated is unchanged, and its ``finite`` is False. No values of A and B
    cause an error.

    Each layer's A and B are first divided by a power of two near their largest number. So neither large nor small
    numbers overflow or vanish on the way.

    Args:
        A: factors A, (n, r, d_in), float32 or float64.
        B: factors B, (n, d_out, r), in the dtype of A.
        acts: True for a triplet that acts, (n, r), bool.

    Example:
        >>> A, B = torch.randn(1, 2, 5), torch.randn(1, 3, 2)
        >>> turned = principal_directions(A, B, torch.ones(1, 2, dtype=torch.bool))
        >>> torch.allclose(turned.B @ turned.A, B @ A, atol=1e-5)
        True
        >>> torch.allclose(turned.strengths, torch.linalg.svdvals(B @ A)[:, :2], atol=1e-5)
        True
    """
    valid = A.isfinite().flatten(1).all(1) & B.isfinite().flatten(1).all(1)
    takes_part = acts & valid[:, None]
    a = torch.where(takes_part[:, :, None], A, torch.zeros_like(A))
    b = torch.where(takes_part[:, None, :], B, torch.zeros_like(B))
    row_sizes, column_sizes = largest(a, (2,))[:, :, 0], largest(b, (1,))[:, 0]
    power_A, power_B = (power_below(largest(sizes, (1,))) for sizes in (row_sizes, column_sizes))
    own = _decomposed(a / power_A[:, :, None], b / power_B[:, :, None], takes_part.sum(1))
    found = own._replace(
        A=own.A * power_A[:, :, None],
        B=own.B * power_B[:, :, None],
        strengths=_times(own.strengths, power_A, power_B),
        finite=own.finite & valid & ~_lost(row_sizes, column_sizes),
    )
    came_out = torch.stack([each.isfinite().flatten(1).all(1) for each in found[:5]]).all(0)
    finite = found.finite & came_out
    keep = finite[:, None, None]
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device).expand_as(found.turn)
    return Principal(
        torch.where(keep, found.A, A),
        torch.where(keep, found.B, B),
        torch.where(finite[:, None], found.strengths, _strengths_of_triplets(a, b)),
        torch.where(keep, found.turn, eye),
        torch.where(keep, found.inverse, eye),
        finite,
    )


def _decomposed(a: Tensor, b: Tensor, counts: Tensor) -> Principal:
    """Do the work of `principal_directions` on finite numbers of at most 2, with ``counts``, (n,), acting triplets."""
    try:
        return _turned(a, b, counts)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # The message names at most one layer of the batch, so each layer is tried alone.
        if len(a) > 1:
            parts = [_decomposed(a[n : n + 1], b[n : n + 1], counts[n : n + 1]) for n in range(len(a))]
            return Principal(*(torch.cat(each) for each in zip(*parts, strict=True)))
    square = a.new_zeros(1, a.shape[1], a.shape[1])
    no = torch.zeros(1, dtype=torch.bool, device=a.device)
    return Principal(a, b, square[:, 0], square, square, no)


def _turned(a: Tensor, b: Tensor, counts: Tensor) -> Principal:
    rank = a.shape[1]
    norm = (a.square().sum((1, 2)) / counts.clamp_min(1)).sqrt()[:, None, None]
    Q_A, R_A = torch.linalg.qr(a.mT)
    Q_B, R_B = torch.linalg.qr(b)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    # A width below r gives fewer than r directions.
    S, U, Vh = _padded(S, rank, 1), _padded(U, rank, 2), _padded(Vh, rank, 1)
    leads = torch.arange(rank, device=a.device) < counts[:, None]  # as many directions as there are triplets
    S, Vh = S * leads, Vh * leads[:, :, None]
    safe = torch.where(norm > 0, norm, 1.0)
    return Principal(
        A=norm * (Vh @ Q_A.mT),
        B=(Q_B @ U) * (S[:, None, :] / safe),
        strengths=S,
        turn=norm * (Vh @ torch.linalg.pinv(R_A, rtol=_RELATIVE).mT),
        inverse=(R_A.mT @ Vh.mT) / safe,
        finite=torch.ones(len(a), dtype=torch.bool, device=a.device),
    )


def _lost(row_sizes: Tensor, column_sizes: Tensor) -> Tensor:
    """Which layers, (n,), bool, have products that vanish next to the largest numbers of A and B.

    This happens if the large numbers of A belong to other triplets than those of B.

    Args:
        row_sizes: largest absolute value in each row of A, (n, r).
        column_sizes: largest absolute value in each column of B, (n, r).
    """
    info = torch.finfo(row_sizes.dtype)
    in_A, in_B = (each.log2() - largest(each, (1,)).log2() for each in (row_sizes, column_sizes))
    top = (in_A + in_B).amax(1)  # NaN if A or B is 0, minus infinity if all products are 0
    return (top > -math.inf) & (top < math.log2(info.tiny / info.eps))


def _strengths_of_triplets(a: Tensor, b: Tensor) -> Tensor:
    """``|b_i| |a_i|`` of every triplet, (n, r), at most the largest finite number of the dtype."""
    power_a, power_b = power_below(largest(a, (2,))), power_below(largest(b, (1,)))
    norms = torch.linalg.vector_norm(a / power_a, dim=2) * torch.linalg.vector_norm(b / power_b, dim=1)
    return _times(norms, power_a[:, :, 0], power_b[:, 0])


def _times(values: Tensor, power: Tensor, other: Tensor) -> Tensor:
    """``values * power * other`` for powers of two, at most the largest finite number of the dtype."""
    # If the product of both powers is out of range, both are large or both are small. Then the order does not matter.
    both = power * other
    usable = both.isfinite() & (both > 0)
    product = torch.where(usable, values * both, values * power * other)
    return product.clamp(max=torch.finfo(values.dtype).max)


def _padded(values: Tensor, size: int, dim: int) -> Tensor:
    missing = size - values.shape[dim]
    if not missing:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim)
