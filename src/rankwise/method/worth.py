"""The score of the default form: what a direction of a layer's update is worth, relative to its cost."""

from __future__ import annotations

import torch
from torch import Tensor

_POWER_OF_COSTS, _BELOW_ONE = 2 / 3, 3 / 2


def worth(strengths: Tensor, gradient_norms: Tensor, costs: Tensor, target_r: float) -> Tensor:
    """``sqrt(strength * gradient norm) / cost ** (2 / 3)`` of every direction.

    Below an average rank of 1 the power of the cost is 3 / 2.

    The product of strength and gradient norm estimates, to first order, how much the direction's movement has lowered
    the loss. It leaves out the angle between movement and gradient. It is AdaLoRA's sensitivity ``|weight * gradient|``
    (Zhang et al., 2023, equation 8), for a direction instead of an element. Neither factor is enough alone. Adam moves
    all layers about equally far, however small their gradients are, and a large gradient is of no use where nothing
    moves. The gradient is that of the whole block, because the gradient of a single direction is mostly noise.

    The power of the cost decides between wide and narrow layers. It was found by measurement
    (benchmarks/quality/choices.md). The square root changes no order. It keeps numbers of any size within the range of
    the dtype.

    Args:
        strengths: singular values of the updates, (triplets,), floating point, at least 0.
        gradient_norms: norms of the gradients of the directions' blocks, (triplets,), in any unit, at least 0.
        costs: number of parameters of each direction in A and B, (triplets,).
        target_r: the average rank at the end, greater than 0.

    Returns:
        The worth of every direction, (triplets,), in the dtype of the strengths, but at least in float32.

    Example:
        >>> import torch
        >>> values = torch.tensor([4.0, 1.0]), torch.tensor([4.0, 64.0]), torch.tensor([8, 27])
        >>> worth(*values, target_r=1), worth(*values, target_r=0.25)
        (tensor([1.0000, 0.8889]), tensor([0.1768, 0.0570]))
    """
    power = _POWER_OF_COSTS if target_r >= 1 else _BELOW_ONE
    # The root of each factor, and not of the product, which might overflow or vanish.
    # Powers of costs are too large for float16.
    wide = torch.promote_types(strengths.dtype, torch.float32)
    return strengths.to(wide).sqrt() * gradient_norms.to(wide).sqrt() / costs.to(wide).pow(power)
