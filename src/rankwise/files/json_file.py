"""Reads JSON from untrusted sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankwise.files.pointers import refuse_pointer


def read_json(path: Path) -> Any:
    """Read the value in a file of JSON in UTF-8.

    Raises:
        OSError: the file does not exist or can't be read.
        ValueError: the file is not valid JSON, or it has NaN, infinities, or a field that appears twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_object)
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise ValueError(f"{path} is broken: it is not valid JSON ({error}).") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {double!r} appears twice")
    return found
