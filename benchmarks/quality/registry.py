"""The tasks of the comparison by name."""

from __future__ import annotations

from collections.abc import Callable

import language
import sentences
import speech
from tasks import Sources, Task

TASKS: dict[str, Callable[[str, Sources], Task]] = {
    "movie-sentiment": sentences.make,  # the one that choices were made by; the others are only reported
    "movie-rating": sentences.make,
    "review-language": language.make,
    "speech": speech.make,
}
