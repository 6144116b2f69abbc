"""The singular values of an adapter's updates: they show how much of each layer's rank the update uses."""

from __future__ import annotations

import os
from pathlib import Path

from rankwise.storage.compress import principal
from rankwise.storage.updates import read_updates


def update_spectra(folder: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Compute the singular values of every layer's update.

    Args:
        folder: an adapter's folder, written by rankwise or by PEFT.

    Returns:
        For each module path its nonzero singular values, the largest first: at most as many as the layer's rank.
        Grouped convolutions of plain LoRA are left out, because their updates are not a single product.

    Raises:
        FileNotFoundError, TypeError, ValueError: the adapter can't be read, or its updates are more than the product
            of its factors (DoRA, for example).
    """
    updates = {path: update.of_weight() for path, update in read_updates(Path(folder)).layers.items()}
    return {
        path: principal(update)[1].tolist() if update.rank else []
        for path, update in updates.items()
        if update is not None
    }
