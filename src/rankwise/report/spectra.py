"""The singular values of an adapter's updates: how much of each layer's rank the update really uses."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from rankwise.attach.attachment import base_scaling
from rankwise.storage import read_adapter


def update_spectra(folder: str | os.PathLike[str]) -> dict[str, list[float]]:
    """The singular values of every layer's update, the largest first.

    Args:
        folder: an adapter's folder, written by rankwise or by PEFT.

    Returns:
        For each module path as many numbers as the layer has ranks (fewer where the layer is narrower). LoRA's
        convolutions with groups are left out: their updates are no single product.

    Raises:
        FileNotFoundError, TypeError, ValueError: it can't be read, or computes more than the product of its factors.
    """
    file = read_adapter(Path(folder))
    found = {}
    for path, factors in file.factors.items():
        A, B, E = factors["A"], factors["B"], factors.get("E")
        rank = A.shape[0]
        if B.shape[1] != rank:  # LoRA's convolutions with groups, whose update is a product for each group
            continue
        scale = base_scaling(file.config, path, rank) if rank else 0.0
        found[path] = [scale * float(value) for value in singular_values(A, B, E)]
    return found


@torch.no_grad()
def singular_values(A: Tensor, B: Tensor, E: Tensor | None = None) -> Tensor:
    """The singular values of B diag(E) A, without the product: by those of an r x r matrix, from two thin QRs.

    Args:
        A: shape (r, d_in, ...); what follows d_in, as of a convolution, is counted to it.
        B: shape (d_out, r, ...).
        E: shape (r, 1), or None for ones.

    Returns:
        Shape (min(d_in, r, d_out),), in float64, the largest first.

    Example:
        >>> A, B = torch.eye(2, 5), torch.eye(4, 2)
        >>> singular_values(A, B, torch.tensor([[2.0], [-3.0]]))
        tensor([3.0000, 2.0000], dtype=torch.float64)
    """
    A, B = A.double().flatten(1), B.double().flatten(1)
    if E is not None:
        A = A * E.double()
    _, of_A = torch.linalg.qr(A.T, mode="r")
    _, of_B = torch.linalg.qr(B, mode="r")
    values: Tensor = torch.linalg.svdvals(of_B @ of_A.T)
    return values


def effective_rank(values: list[float]) -> float:
    """How many directions an update spreads over: the exponential of the entropy of its squared singular values.

    Example:
        >>> effective_rank([2.0, 2.0, 2.0]), effective_rank([5.0, 0.0])
        (3.0, 1.0)
    """
    squares = torch.tensor(values, dtype=torch.float64).square()
    total = squares.sum()
    if not total > 0:
        return 0.0
    return round(float(torch.special.entr(squares / total).sum().exp()), 6)
