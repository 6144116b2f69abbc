"""What an adapter's update is multiplied by, as PEFT has it."""

from __future__ import annotations

import math

_EPSILON = 1e-5  # in PEFT's AdaLoRA


def lora_scale(alpha: float, rank: float, use_rslora: bool = False) -> float:
    """The factor before B A: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA.

    Example:
        >>> lora_scale(16, 4), lora_scale(16, 4, use_rslora=True)
        (4.0, 8.0)
    """
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def adalora_scale(alpha: float, init_r: int) -> float:
    """The factor before B diag(E) A, which stays as it is when ranks are pruned.

    Example:
        >>> round(adalora_scale(8, 4), 4)
        2.0
    """
    return alpha / (init_r + _EPSILON)
