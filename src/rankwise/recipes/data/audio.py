"""Decoding audio files: WAV, FLAC, MP3, Ogg and all other kinds that libsndfile reads, at any sample rate."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

# Folders are searched for these endings. Tables may name files of any kind that libsndfile reads.
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif")


class AudioError(ValueError):
    """An audio file can't be decoded."""


def seconds(source: str | bytes) -> float:
    """The length of an audio file in seconds, read from its header.

    Args:
        source: the file's path, or its contents.

    Raises:
        AudioError: the file does not exist, is not audio, or holds no sound.
    """
    import soundfile

    try:
        length = soundfile.info(_opened(source)).duration
    except (OSError, RuntimeError) as error:  # soundfile's errors are RuntimeErrors
        raise AudioError(_reason(source, error)) from error
    if length == 0:
        raise AudioError("holds no sound")
    return float(length)


def decode(source: str | bytes, rate: int, longest: float) -> NDArray[float32]:
    """The sound of an audio file: one channel, resampled to ``rate`` samples per second.

    Args:
        source: the file's path, or its contents.
        rate: the sample rate, in samples per second.
        longest: the most seconds to read.

    Returns:
        The samples in [-1, 1], shape (n,), float32.

    Raises:
        AudioError: the file can't be decoded, or holds samples that are NaN or infinite.
    """
    import numpy as np
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(_opened(source)) as file:
            channels = file.read(int(longest * file.samplerate) + 1, dtype="float32", always_2d=True)
            found = file.samplerate
    except (OSError, RuntimeError) as error:
        raise AudioError(_reason(source, error)) from error
    if not len(channels):
        raise AudioError("holds no sound")
    if not np.isfinite(channels).all():
        raise AudioError("holds samples that are NaN or infinite")
    mixed = channels.mean(axis=1)
    if abs(mixed).max() < 0.01 * abs(channels).max():
        # The channels are the same sound with opposite signs, so that their mean would be silence.
        mixed = channels[:, 0]
    mono: NDArray[float32] = soxr.resample(mixed, found, rate)
    return mono


def _opened(source: str | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _reason(source: str | bytes, error: Exception) -> str:
    from pathlib import Path

    if isinstance(source, str) and not Path(source).is_file():
        return "does not exist"
    # soundfile says "Error opening 'clip.wav': Format not recognised."
    return f"can't be read as audio: {str(error).rpartition(': ')[2].rstrip('.')}"
