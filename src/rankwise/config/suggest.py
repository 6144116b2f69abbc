"""Find the nearest known name, for messages about unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, or_part: bool = False) -> str | None:
    """Return the known name that ``name`` most likely stands for, or None.

    Names are compared by spelling. Upper and lower case, dashes and underscores make no difference.

    Args:
        name: the name that was given.
        known: the names that are known.
        or_part: if no name is close, take a known name that contains ``name``.

    Example:
        >>> nearest("learning-rat", ["learning_rate", "seed"])
        'learning_rate'
        >>> nearest("batch_size", ["per_device_train_batch_size", "max_steps"], or_part=True)
        'per_device_train_batch_size'
        >>> nearest("colour", ["seed"]) is None
        True
    """
    names = list(known)
    plain = {_plain(each): each for each in reversed(names)}
    close = difflib.get_close_matches(_plain(name), list(plain), n=1)
    if close:
        return plain[close[0]]
    if not or_part or len(name) < 3:
        return None
    return next((each for each in names if _plain(name) in _plain(each)), None)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the known name nearest to ``name``. If none is near, return an empty text.

    Example:
        >>> suggestion("q_porj", ["q_proj", "v_proj"])
        " Did you mean 'q_proj'?"
        >>> suggestion("q_proj", ["xyz"])
        ''
    """
    found = nearest(name, known)
    return "" if found is None else f" Did you mean {found!r}?"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
