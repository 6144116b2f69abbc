"""Nearest names, for messages about names that don't exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], question: str = " Did you mean {}?") -> str:
    """A sentence that suggests the known name nearest to ``name``, or nothing if none is near.

    Example:
        >>> nearest("q_porj", ["q_proj", "v_proj"])
        " Did you mean 'q_proj'?"
        >>> nearest("q_proj", ["xyz"])
        ''
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return question.format(repr(found[0])) if found else ""
