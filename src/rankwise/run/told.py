"""Warnings that are given once."""

from __future__ import annotations

import warnings


class Told:
    """Warns of each message once.

    Example:
        >>> with warnings.catch_warnings(record=True) as given:
        ...     warnings.simplefilter("always")
        ...     told = Told()
        ...     told("Look."), told("Look.")
        (None, None)
        >>> len(given)
        1
    """

    def __init__(self) -> None:
        self._messages: set[str] = set()

    def __call__(self, message: str) -> None:
        """Warn, unless it was said already."""
        if message not in self._messages:
            self._messages.add(message)
            warnings.warn(message, stacklevel=2)
