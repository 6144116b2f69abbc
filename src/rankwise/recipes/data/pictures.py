"""Decoding pictures with Pillow: JPEG, PNG, WebP and all other kinds that Pillow reads."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

# Folders are searched for these endings. Tables may name files of any kind that Pillow reads.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class PictureError(ValueError):
    """A picture can't be decoded."""


def size(source: str | bytes) -> tuple[int, int]:
    """The width and height of a picture in pixels, read from its header.

    Args:
        source: the picture's path, or its contents.

    Raises:
        PictureError: the file does not exist, or is not a picture.
    """
    with _opened(source) as picture:
        return int(picture.width), int(picture.height)


def decode(source: str | bytes) -> Image:
    """A picture in RGB, turned upright.

    Args:
        source: the picture's path, or its contents.

    Raises:
        PictureError: the picture can't be decoded.
    """
    from PIL import ImageOps

    with _opened(source) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


@contextmanager
def _opened(source: str | bytes) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if picture.mode.startswith(("I", "F")):
                raise PictureError(
                    f"has more than 8 bits per pixel (mode {picture.mode}), and would become white: save it with 8 bits"
                )
            yield picture
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError("does not exist") from error
    except UnidentifiedImageError as error:
        raise PictureError("can't be read as a picture") from error
    # Pillow raises a SyntaxError for a broken PNG, and other errors for other formats.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        place = (
            "is a folder"
            if isinstance(source, str) and Path(source).is_dir()
            else "can't be read as a picture"
        )
        raise PictureError(f"{place}: {error}") from error
