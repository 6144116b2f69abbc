"""The scale of an adapter's update, as in PEFT."""

from __future__ import annotations

import math

_EPSILON = 1e-5  # the constant in PEFT's AdaLoRA


def lora_scale(alpha: float, rank: float, use_rslora: bool = False) -> float:
    """The factor of B A: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA.

    Example:
        >>> lora_scale(16, 4), lora_scale(16, 4, use_rslora=True)
        (4.0, 8.0)
    """
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def adalora_scale(alpha: float, init_r: int) -> float:
    """The factor of B diag(E) A in the paper's form. It does not change when ranks are cut.

    Example:
        >>> round(adalora_scale(8, 4), 4)
        2.0
    """
    return alpha / (init_r + _EPSILON)


def pace(target_r: float, average: float, use_rslora: bool = False) -> float:
    """The factor by which the final scale is multiplied while each layer has ``average`` ranks on average.

    Adam moves a layer in proportion to scale times rank. The factor ``target_r / average`` keeps this product constant
    while ranks are cut. With rsLoRA the factor is its square root.

    Example:
        >>> pace(2, 8), pace(2, 8, use_rslora=True)
        (0.25, 0.5)
    """
    ratio = target_r / average if average > 0 else 1.0
    return math.sqrt(ratio) if use_rslora else ratio
