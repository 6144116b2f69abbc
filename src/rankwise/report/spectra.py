"""The singular values of an adapter's updates: how much of each layer's rank the update really uses."""

from __future__ import annotations

import os
from pathlib import Path

from rankwise.storage.compress import principal
from rankwise.storage.updates import read_updates


def update_spectra(folder: str | os.PathLike[str]) -> dict[str, list[float]]:
    """The singular values of every layer's update, the largest first.

    Args:
        folder: an adapter's folder, written by rankwise or by PEFT.

    Returns:
        For each module path the singular values that are not 0, at most as many as the layer has ranks. LoRA's
        convolutions with groups are left out, unless AdaLoRA wrote them: their updates are no single product.

    Raises:
        FileNotFoundError, TypeError, ValueError: it can't be read, or computes more than the product of its factors.
    """
    updates = {path: update.of_weight() for path, update in read_updates(Path(folder)).layers.items()}
    return {
        path: principal(update)[1].tolist() if update.rank else []
        for path, update in updates.items()
        if update is not None
    }
