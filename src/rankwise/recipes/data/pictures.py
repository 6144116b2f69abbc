"""Decode pictures with Pillow: JPEG, PNG, WebP and whatever else it reads."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

# What a folder is searched for; a table may name files of any other kind that Pillow reads.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class PictureError(ValueError):
    """A picture can't be decoded."""


def size(source: str | bytes) -> tuple[int, int]:
    """The width and height of a picture, from its header.

    Args:
        source: its path, or its contents.

    Raises:
        PictureError: it does not exist, or is no picture.
    """
    with _opened(source) as picture:
        return int(picture.width), int(picture.height)


def decode(source: str | bytes) -> Image:
    """A picture in RGB, the right way up.

    Args:
        source: its path, or its contents.

    Raises:
        PictureError: it can't be decoded.
    """
    from PIL import ImageOps

    with _opened(source) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


@contextmanager
def _opened(source: str | bytes) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            yield picture
    except FileNotFoundError as error:
        raise PictureError("does not exist") from error
    except UnidentifiedImageError as error:
        raise PictureError("can't be read as a picture") from error
    # Pillow raises a SyntaxError for a broken PNG, and more kinds for others.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        place = (
            "is a folder"
            if isinstance(source, str) and Path(source).is_dir()
            else "can't be read as a picture"
        )
        raise PictureError(f"{place}: {error}") from error
