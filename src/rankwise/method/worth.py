"""What a direction of a layer's update is worth to keep, for what it costs: the score of the default form."""

from __future__ import annotations

from torch import Tensor

_POWER_OF_COSTS, _BELOW_ONE = 2 / 3, 3 / 2


def worth(strengths: Tensor, gradient_norms: Tensor, costs: Tensor, target_r: float) -> Tensor:
    """``sqrt(strength * gradient norm) / cost ** (2 / 3)`` of every direction.

    Below an average rank of 1 the power of the cost is 3 / 2.

    The product is, to first order and but for the angle between the two, what the direction's movement did for the
    loss: AdaLoRA's sensitivity ``|weight * gradient|`` (Zhang et al., 2023, equation 8), of a direction instead of
    an element. Neither factor will do alone: Adam moves all layers about equally far, however small their gradients
    are, and a large gradient is no use where nothing moves. The gradient is taken from the whole block, since that of
    a single direction is mostly noise. How much costs count is found by measurement (benchmarks/quality/choices.md): the
    power of the cost decides between wide layers and narrow ones. The root changes no order. It keeps numbers of any
    size inside of what the dtype can hold.

    Args:
        strengths: singular values of the updates, (triplets,), floating point, at least 0.
        gradient_norms: how large the gradients of their blocks were, (triplets,), in any unit.
        costs: the numbers that each has in A and B, (triplets,).
        target_r: the average rank in the end, greater than 0.

    Example:
        >>> import torch
        >>> values = torch.tensor([4.0, 1.0]), torch.tensor([4.0, 64.0]), torch.tensor([8, 27])
        >>> worth(*values, target_r=1), worth(*values, target_r=0.25)
        (tensor([1.0000, 0.8889]), tensor([0.1768, 0.0570]))
    """
    power = _POWER_OF_COSTS if target_r >= 1 else _BELOW_ONE
    # The root of each factor, and not of the product, which might overflow or vanish.
    return strengths.sqrt() * gradient_norms.sqrt() / costs.to(strengths.dtype).pow(power)
