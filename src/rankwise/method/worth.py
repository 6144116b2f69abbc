"""What a direction of a layer's update is worth to keep, for what it costs: the score of the default form."""

from __future__ import annotations

from torch import Tensor

_EXPONENT, _EXPONENT_BELOW_ONE = 1 / 2, 1 / 3


def worth(strengths: Tensor, gradient_norms: Tensor, costs: Tensor, target_r: float) -> Tensor:
    """``sqrt(strength * gradient norm) / cost`` of every direction; below an average rank of 1 the cube root.

    The product is, to first order and but for the angle between the two, what the direction's movement did for the
    loss: AdaLoRA's sensitivity ``|weight * gradient|`` (Zhang et al., 2023, equation 8), of a direction instead of
    an element. Neither factor will do alone: Adam moves all layers about equally far, however small their gradients
    are, and a large gradient is no use where nothing moves. The roots are found by measurement, as is that the
    gradient is taken from the whole block: of a single direction it is mostly noise
    (benchmarks/quality/choices.md). The higher the root, the more a direction's cost counts; that matters
    where a budget is for a few directions only.

    Args:
        strengths: singular values of the updates, (triplets,), floating point, at least 0.
        gradient_norms: how large the gradients of their blocks were, (triplets,), in any unit.
        costs: the numbers that each has in A and B, (triplets,).
        target_r: the average rank in the end, greater than 0.

    Example:
        >>> import torch
        >>> values = torch.tensor([4.0, 1.0]), torch.tensor([4.0, 64.0]), torch.tensor([2, 8])
        >>> worth(*values, target_r=1), worth(*values, target_r=0.25)
        (tensor([2., 1.]), tensor([1.2599, 0.5000]))
    """
    exponent = _EXPONENT if target_r >= 1 else _EXPONENT_BELOW_ONE
    # The root of each factor, and not of the product, which might overflow or vanish.
    return strengths.pow(exponent) * gradient_norms.pow(exponent) / costs
