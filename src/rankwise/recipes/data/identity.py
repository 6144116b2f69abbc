"""Which examples a run has: their numbers and a digest, by which a later start can tell that the data has changed."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from typing import Any

from rankwise.recipes.data.splits import some_examples

_MOST = 2000  # examples of each part that are compared


def facts_of(train: Any, evaluation: Any, labels: Any) -> dict[str, Any]:
    """The numbers of examples, and a digest of the examples and of the labels' names.

    Of large data, the digest covers 2,000 examples that are spread evenly. Files count by their names.

    Args:
        train: the training examples.
        evaluation: the held-out examples.
        labels: the names of the labels, by number, or None.

    Example:
        >>> one = facts_of([{"text": "a"}, {"text": "b"}], [{"text": "c"}], None)
        >>> one["train"], one["held_out"], one == facts_of([{"text": "a"}, {"text": "c"}], [{"text": "b"}], None)
        (2, 1, False)
    """
    digest = hashlib.sha256(repr(None if labels is None else list(labels)).encode())
    for examples in (train, evaluation):
        for example in some_examples(examples, _MOST):
            digest.update(repr(_plain(example)).encode("utf-8", "surrogatepass"))
    return {"train": len(train), "held_out": len(evaluation), "digest": digest.hexdigest()[:16]}


def what_changed(before: Any, now: Mapping[str, Any]) -> str | None:
    """In what the data differs from that of an earlier start, as a part of a sentence. None: it is the same.

    Args:
        before: the result of `facts_of` at the earlier start. Anything else means that it is not known.
        now: the result of `facts_of` now.

    Example:
        >>> what_changed({"train": 9, "held_out": 1, "digest": "a"}, {"train": 18, "held_out": 2, "digest": "b"})
        '9 examples trained and 1 held out then, 18 and 2 now'
    """
    if not isinstance(before, Mapping) or before == now:
        return None
    then, here = ([facts.get(key) for key in ("train", "held_out")] for facts in (before, now))
    if then == here:
        return f"{here[0]:,} examples trained and {here[1]:,} held out then and now, but not the same ones"
    return f"{then[0]:,} examples trained and {then[1]:,} held out then, {here[0]:,} and {here[1]:,} now"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, bytes):
        return zlib.crc32(value)
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
