"""Warnings that are given once."""

from __future__ import annotations

import warnings


class WarnOnce:
    """Gives each warning once.

    Example:
        >>> with warnings.catch_warnings(record=True) as given:
        ...     warnings.simplefilter("always")
        ...     warn = WarnOnce()
        ...     warn("Look."), warn("Look.")
        (None, None)
        >>> len(given)
        1
    """

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, message: str) -> None:
        """Give the warning, unless it was given before."""
        if message not in self._given:
            self._given.add(message)
            warnings.warn(message, stacklevel=2)
