"""The orthogonality penalty and its gradient in closed form.

AdaLoRA keeps the rows of A and the columns of B near orthonormal (Zhang et al., 2023, equation 4):

    R = weight * mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F

with d||B^T B - I||_F / dB = 2 B (B^T B - I) / ||B^T B - I||_F, and likewise for A. Knowing the gradient, the
penalty needs no place in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality_penalty(rows: Sequence[Tensor]) -> Tensor:
    """Mean of ``||M M^T - I||_F`` over matrices M, each (r, width); a 0-dim tensor.

    Example:
        >>> orthogonality_penalty([torch.eye(2, 3), torch.zeros(1, 5)])
        tensor(0.5000)
    """
    norms = [_gram_error(stack).flatten(1).norm(dim=1) for stack, _ in _stacks(rows)]
    return torch.cat(norms).sum() / len(rows) if norms else torch.zeros(())


def orthogonality_gradients(rows: Sequence[Tensor], weight: float, count: int) -> list[Tensor]:
    """Gradient of ``weight * orthogonality_penalty`` for each matrix, in its shape, at least float32.

    Where a matrix is exactly orthonormal the gradient is 0. Matrices of one shape share one batched product.

    Args:
        rows: the matrices to differentiate by, each (r, width).
        weight: of the penalty in the loss.
        count: how many matrices the penalty's mean is over, ``rows`` and others.
    """
    gradients: list[Tensor] = [torch.empty(0)] * len(rows)
    for stack, places in _stacks(rows):
        error = _gram_error(stack)
        norm = error.flatten(1).norm(dim=1)[:, None, None]
        factor = torch.where(norm > 0, 2 * weight / count / norm, torch.zeros_like(norm))
        for place, gradient in zip(places, (error @ stack).mul_(factor).unbind(0), strict=True):
            gradients[place] = gradient
    return gradients


def _gram_error(stack: Tensor) -> Tensor:
    gram = stack @ stack.mT
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.element_size() >= 4 else matrix.float()


def _stacks(rows: Sequence[Tensor]) -> list[tuple[Tensor, list[int]]]:
    groups: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for place, matrix in enumerate(rows):
        groups.setdefault((matrix.shape, matrix.device), []).append(place)
    return [(torch.stack([_wide(rows[p].detach()) for p in places]), places) for places in groups.values()]
