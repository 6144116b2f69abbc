"""Finds experts that no token has reached."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.run.factors import Factors


def unreached_ranks(factors: Factors) -> Tensor | None:
    """The ranks of experts that no token has reached, (ranks,), bool; None if there are no experts.

    In such an expert B is still 0 in all ranks, so they add exactly 0. If that holds for all layers, no token is known
    to have reached any, and no rank is reported.
    """
    blocks = factors.layout.block_counts
    if all(count == 1 for count in blocks):
        return None
    device = factors.mask.device
    moved = [(rows != 0).any(1).to(device) for rows in factors.rows("B")]
    if "E" in factors.keys:
        gates = [(rows != 0).any(1).to(device) for rows in factors.rows("E")]
        moved = [one & other for one, other in zip(moved, gates, strict=True)]
    adds = torch.cat(moved)
    several = [count > 1 for count in blocks for _ in range(count)]
    idle = torch.tensor(several, device=device) & (factors.block_ranks(adds) == 0)
    return factors.spread(idle) & adds.any()
