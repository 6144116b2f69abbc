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


def pace(target_r: float, average: float, use_rslora: bool = False) -> float:
    """What the scale of the end is multiplied by while ``average`` ranks act in each layer.

    Adam moves a layer in proportion to scale times rank. So ``target_r / average`` keeps that constant while ranks are
    cut; with rsLoRA it is the square root.

    Example:
        >>> pace(2, 8), pace(2, 8, use_rslora=True)
        (0.25, 0.5)
    """
    ratio = target_r / average if average > 0 else 1.0
    return math.sqrt(ratio) if use_rslora else ratio
