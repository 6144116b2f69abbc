"""Batches for `Task.largest_batch`: tensors with the right names, shapes and dtypes. Their values do not matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH_IF_UNKNOWN = 512
_LONGEST = 2048
_SIDE_IF_UNKNOWN = 224


def longest(wanted: int | None, config: Any) -> int:
    """The number of tokens of the longest text: ``wanted`` or, if that is None, the model's limit up to 2048.

    Example:
        >>> from types import SimpleNamespace
        >>> longest(None, SimpleNamespace(max_position_embeddings=128)), longest(64, SimpleNamespace())
        (128, 64)
    """
    return wanted or min(getattr(config, "max_position_embeddings", None) or _LENGTH_IF_UNKNOWN, _LONGEST)


def text_batch(size: int, length: int, labels: str = "tokens") -> dict[str, Tensor]:
    """A batch of texts: int64 ``input_ids`` and ``attention_mask``, shape (size, length), and ``labels``.

    Args:
        size: the number of examples.
        length: the number of tokens of each example.
        labels: the kind of labels. ``tokens``: int64, one for each token, shape (size, length). ``classes``: int64, one
            for each text, shape (size,). ``numbers``: float32, one for each text, shape (size,).

    Example:
        >>> {name: tuple(tensor.shape) for name, tensor in text_batch(2, 8, "classes").items()}
        {'input_ids': (2, 8), 'attention_mask': (2, 8), 'labels': (2,)}
    """
    import torch

    shape = (size, length) if labels == "tokens" else (size,)
    dtype = torch.float32 if labels == "numbers" else torch.int64
    return {
        "input_ids": torch.zeros((size, length), dtype=torch.int64, device="meta"),
        "attention_mask": torch.ones((size, length), dtype=torch.int64, device="meta"),
        "labels": torch.zeros(shape, dtype=dtype, device="meta"),
    }


def speech_batch(
    size: int, config: Any, frames: int | None = None, tokens: int | None = None
) -> dict[str, Tensor]:
    """A batch for Whisper: float32 ``input_features``, shape (size, mel bins, frames), and int64 ``labels``.

    Args:
        size: the number of examples.
        config: a Whisper model's configuration.
        frames: the frames of the encoder's window, 100 per second. None: as many as the encoder takes.
        tokens: the tokens of the longest transcript. None: as many as the decoder takes.

    Returns:
        The batch. Its ``labels`` have the shape (size, tokens).
    """
    import torch

    frames = frames or 2 * config.max_source_positions
    tokens = tokens or config.max_target_positions
    return {
        "input_features": torch.zeros(
            (size, config.num_mel_bins, frames), dtype=torch.float32, device="meta"
        ),
        "labels": torch.zeros((size, tokens), dtype=torch.int64, device="meta"),
    }


def image_batch(size: int, config: Any) -> dict[str, Tensor]:
    """A batch of pictures: float32 ``pixel_values``, shape (size, channels, height, width), and int64 ``labels``."""
    import torch

    side = getattr(config, "image_size", _SIDE_IF_UNKNOWN)  # convolutional networks take any size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return {
        "pixel_values": torch.zeros(
            (size, getattr(config, "num_channels", 3), height, width), dtype=torch.float32, device="meta"
        ),
        "labels": torch.zeros((size,), dtype=torch.int64, device="meta"),
    }
