"""Decode audio files: WAV, FLAC, MP3, Ogg and whatever else libsndfile reads, at any sample rate."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

# What a folder is searched for; a table may name files of any other kind that libsndfile reads.
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif")


class AudioError(ValueError):
    """An audio file can't be decoded."""


def seconds(source: str | bytes) -> float:
    """How long an audio file is, from its header.

    Args:
        source: its path, or its contents.

    Raises:
        AudioError: it does not exist, is no audio, or holds no sound.
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
    """The sound of an audio file: one channel, ``rate`` samples a second.

    Args:
        source: its path, or its contents.
        rate: samples a second to resample to.
        longest: seconds to read at most.

    Returns:
        Samples in [-1, 1], shape (n,).

    Raises:
        AudioError: it can't be decoded.
    """
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
    mono: NDArray[float32] = soxr.resample(channels.mean(axis=1), found, rate)
    return mono


def _opened(source: str | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _reason(source: str | bytes, error: Exception) -> str:
    from pathlib import Path

    if isinstance(source, str) and not Path(source).is_file():
        return "does not exist"
    # soundfile says "Error opening 'clip.wav': Format not recognised."
    return f"can't be read as audio: {str(error).rpartition(': ')[2].rstrip('.')}"
