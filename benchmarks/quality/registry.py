"""The tasks of the comparison by name, and what each of them needs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import language
import letters
import names
import pairs
import sentences
import speech
from tasks import Sources, Task

TASKS: dict[str, Callable[[str, Sources], Task]] = {
    "movie-sentiment": sentences.make,
    "movie-rating": sentences.make,
    "movie-rating-long": sentences.make,
    "tweet-rating": sentences.make,
    "product-rating": sentences.make,
    "editorial-rating": sentences.make,
    "news-topic": sentences.make,
    "review-language": language.make,
    "review-language-long": language.make,
    "chichewa": language.make,
    "indonesian": language.make,
    "chichewa-letters": letters.make,
    "indonesian-letters": letters.make,
    "chichewa-letters-long": letters.make,
    "indonesian-letters-long": letters.make,
    "speech": speech.make,
    "names": names.make,
    "pairs": pairs.make,
    "pairs-long": pairs.make,
}
# The options of the command that name their data.
NEEDS = {
    "movie-sentiment": "reviews",
    "movie-rating": "reviews",
    "movie-rating-long": "reviews",
    "tweet-rating": "snippets",
    "product-rating": "snippets",
    "editorial-rating": "snippets",
    "review-language": "reviews",
    "review-language-long": "reviews",
    "speech": "speech",
    "chichewa-letters": "reviews",
    "indonesian-letters": "reviews",
    "chichewa-letters-long": "reviews",
    "indonesian-letters-long": "reviews",
    "pairs": "reviews",
    "pairs-long": "reviews",
}


@functools.cache
def make_task(name: str, sources: Sources) -> Task:
    """A task by its name; its data are read and prepared once in a process."""
    return TASKS[name](name, sources)
