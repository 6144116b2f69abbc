"""The orthogonality penalty and its gradient in closed form.

AdaLoRA keeps the rows of A and the columns of B near orthonormal (Zhang et al., 2023, equation 4):

    R = weight * mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F

with d||B^T B - I||_F / dB = 2 B (B^T B - I) / ||B^T B - I||_F, and likewise for A. As the gradient is known, it is
added to the gradients directly, and the loss stays as it is.

If p, the largest element of a matrix M, is above 1, M is divided by it first: M M^T - I = p^2 (M/p (M/p)^T - I/p^2).
So no product overflows in a run that diverges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.method.magnitude import largest


def orthogonality_penalty(A: Sequence[Tensor], B: Sequence[Tensor]) -> Tensor:
    """Mean of ``||A A^T - I||_F`` over all A and of ``||B^T B - I||_F`` over all B.

    Args:
        A: matrices of shape (r, width).
        B: matrices of shape (width, r).

    Returns:
        A 0-dim tensor, at least 0; 0 without matrices.

    Example:
        >>> orthogonality_penalty([torch.eye(2, 3)], [torch.zeros(5, 1)])
        tensor(0.5000)
    """
    norms = [_norm(stack, False) for stack, _ in _stacks(A)]
    norms += [_norm(stack, True) for stack, _ in _stacks(B)]
    return (
        torch.cat(norms).sum() / (len(A) + len(B))
        if norms
        else torch.zeros((), dtype=torch.float32, device="cpu")
    )


def orthogonality_gradients(
    matrices: Sequence[Tensor], columns: bool, weight: float, count: int
) -> list[Tensor]:
    """The gradient of ``weight * orthogonality_penalty`` for each matrix, in its shape, in float32 or wider.

    The gradient of an exactly orthonormal matrix is 0. Matrices of one shape share one batched product.

    Args:
        matrices: some of the A, each (r, width), or some of the B, each (width, r).
        columns: True for B, whose columns are to be orthonormal; False for A, whose rows are to be.
        weight: weight of the penalty in the loss, at least 0.
        count: number of matrices in the penalty's mean, including those that are not in ``matrices``.
    """
    gradients: list[Tensor] = [torch.empty(0)] * len(matrices)
    for stack, places in _stacks(matrices):
        scaled, size, error, norm = _error_and_norm(stack, columns)
        error *= torch.where(norm > 0, 2 * weight / count / norm, 0.0)
        error *= size
        product = scaled @ error if columns else error @ scaled
        for place, gradient in zip(places, product.unbind(0), strict=True):
            gradients[place] = gradient
    return gradients


def in_blocks(matrices: Sequence[Tensor], blocks: Sequence[int], columns: bool) -> list[Tensor]:
    """Split each matrix into its number of equal blocks, by rows or by ``columns``.

    Example:
        >>> [each.shape for each in in_blocks([torch.ones(6, 4), torch.ones(2, 4)], [3, 1], columns=False)]
        [torch.Size([2, 4]), torch.Size([2, 4]), torch.Size([2, 4]), torch.Size([2, 4])]
    """
    pairs = zip(matrices, blocks, strict=True)
    return [part for matrix, count in pairs for part in matrix.tensor_split(count, 1 if columns else 0)]


def out_of_blocks(parts: Sequence[Tensor], blocks: Sequence[int], columns: bool) -> list[Tensor]:
    """Join the blocks of each matrix again, the inverse of `in_blocks`."""
    found, start = [], 0
    for count in blocks:
        own = parts[start : start + count]
        found.append(own[0] if count == 1 else torch.cat(list(own), 1 if columns else 0))
        start += count
    return found


def _norm(stack: Tensor, columns: bool) -> Tensor:
    """The Frobenius norm of M M^T - I (or of M^T M - I) for every matrix in a stack (n, …, …), (n,)."""
    _, size, _, norm = _error_and_norm(stack, columns)
    return (norm * size * size).flatten()


def _error_and_norm(stack: Tensor, columns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms of `orthogonality_penalty` for every matrix M in a stack (n, …, …).

    Returns:
        M / p; p, the largest element of M but at least 1, (n, 1, 1); M M^T / p^2 - I / p^2 (or with M^T M), (n, r, r);
        and its Frobenius norm, (n, 1, 1).
    """
    size = largest(stack, (1, 2)).clamp_min(1)
    scaled = stack / size
    error = scaled.mT @ scaled if columns else scaled @ scaled.mT
    error.diagonal(dim1=1, dim2=2).sub_((1 / size / size)[:, :, 0])
    return scaled, size, error, torch.linalg.vector_norm(error, dim=(1, 2), keepdim=True)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.element_size() >= 4 else matrix.float()


def _stacks(matrices: Sequence[Tensor]) -> list[tuple[Tensor, list[int]]]:
    groups: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for place, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape, matrix.device), []).append(place)
    return [
        (torch.stack([_wide(matrices[p].detach()) for p in places]), places) for places in groups.values()
    ]
