"""Scaling by powers of two, so that products of very large or very small numbers neither overflow nor vanish.

Division by a power of two changes the exponent of a number and none of its digits. So a computation on scaled numbers,
scaled back, gives the same digits as one without scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor


def power_below(sizes: Tensor) -> Tensor:
    """The largest power of two that is not above each number. It is 1 for 0, NaN and infinity.

    Args:
        sizes: numbers of at least 0, float32 or float64, of any shape.

    Returns:
        The powers, in the shape and dtype of ``sizes``.

    Example:
        >>> power_below(torch.tensor([5.0, 1.0, 0.3, 0.0, torch.inf]))
        tensor([4.0000, 1.0000, 0.2500, 1.0000, 1.0000])
    """
    mantissa, _ = torch.frexp(sizes)  # in [0.5, 1): the quotient below is exactly a power of two
    power = sizes / (2 * mantissa)
    return torch.where((sizes > 0) & sizes.isfinite(), power, torch.ones_like(sizes))


def largest(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The largest absolute value over the dimensions ``dim``, which stay with length 1. It is 0 for empty tensors.

    Example:
        >>> largest(torch.tensor([[1.0, -3.0], [0.0, 2.0]]), (1,))
        tensor([[3.],
                [2.]])
    """
    shape = [1 if n in {each % values.dim() for each in dim} else size for n, size in enumerate(values.shape)]
    return values.abs().amax(dim, keepdim=True) if values.numel() else values.new_zeros(shape)


def scaled_norm(values: Tensor) -> float:
    """The Frobenius norm in double precision. It is finite for finite values, and 0 only if all values are 0.

    Example:
        >>> round(scaled_norm(torch.tensor([3e30, 4e30])) / 1e30, 6)
        5.0
        >>> round(scaled_norm(torch.tensor([3e-30, 4e-30])) / 1e-30, 6)
        5.0
    """
    if not values.numel():
        return 0.0
    power = power_below(largest(values.detach(), tuple(range(values.dim()))).double())
    return float(torch.linalg.vector_norm(values.detach().double() / power) * power)
