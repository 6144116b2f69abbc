"""The tasks of the comparison by name."""

from __future__ import annotations

from collections.abc import Callable

import language
import sentences
import speech
from tasks import Sources, Task

TASKS: dict[str, Callable[[str, Sources], Task]] = {
    "movie-sentiment": sentences.make,
    "movie-rating": sentences.make,
    "news-topic": sentences.make,  # no choice was made by this one: it is only reported
    "review-language": language.make,
    "speech": speech.make,
}
