"""What a direction of a layer's update is worth to keep, for what it costs: the score of the default form."""

from __future__ import annotations

from torch import Tensor


def worth(strengths: Tensor, gradient_norms: Tensor, costs: Tensor) -> Tensor:
    """``sqrt(strength * gradient norm) / cost`` of every direction.

    The product is, to first order and but for the angle between the two, what the direction's movement did for the
    loss: AdaLoRA's sensitivity ``|weight * gradient|`` (Zhang et al., 2023, equation 8), of a direction instead of
    an element. Neither factor will do alone: Adam moves all layers about equally far, however small their gradients
    are, and a large gradient is no use where nothing moves. The square root is found by measurement, as is that the
    gradient is taken from the whole block: of a single direction it is mostly noise (docs/quality-choices.md).

    Args:
        strengths: singular values of the updates, (triplets,), floating point, at least 0.
        gradient_norms: how large the gradients of their blocks were, (triplets,), in any unit.
        costs: the numbers that each has in A and B, (triplets,).

    Example:
        >>> import torch
        >>> worth(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0]), torch.tensor([2, 2]))
        tensor([1.0000, 1.5000])
    """
    return (strengths * gradient_norms).sqrt() / costs
