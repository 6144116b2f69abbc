"""Gives all layers one rank by adding triplets of zeros, for servers that need it."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.storage.lora_layout import Update
from rankwise.storage.updates import Updates, acting


def padded(updates: Updates, rank: int | None = None) -> dict[str, Update]:
    """Pad every layer to one rank. Layers at rank 0 are included, because servers that stack layers expect them.

    Args:
        updates: updates without grouped convolutions.
        rank: the rank to pad to; by default the largest rank of any layer.

    Raises:
        ValueError: all layers are at rank 0, or one is a grouped convolution.
    """
    acting(updates)
    grouped = next((path for path, update in updates.layers.items() if update.grouped), None)
    if grouped is not None:
        raise ValueError(
            f"{updates.source}: {grouped!r} is a grouped convolution, whose ranks can't be padded: export without it."
        )
    rank = rank or max(update.rank for update in updates.layers.values())
    return {path: _padded(update, rank) for path, update in updates.layers.items()}


def _padded(update: Update, rank: int) -> Update:
    missing = rank - update.rank
    return Update(
        torch.cat([update.A, _zeros(missing, update.A.shape[1], update.A)]),
        torch.cat([update.B, _zeros(update.B.shape[0], missing, update.B)], 1),
        update.kind,
        update.kernel,
    )


def _zeros(rows: int, columns: int, like: Tensor) -> Tensor:
    return like.new_zeros(rows, columns)
