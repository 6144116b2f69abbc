"""Matching of a configuration's names and patterns with the paths of modules."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from rankwise.config import LoraConfig

_T = TypeVar("_T")


def pattern_value(patterns: Mapping[str, _T], path: str, default: _T) -> _T:
    r"""The value of ``rank_pattern`` or ``alpha_pattern`` for ``path``: that of the first key that matches its end.

    Example:
        >>> pattern_value({"layers.0.q": 4, r"layers\.\d+\.q": 2}, "model.layers.0.q", 8)
        4
        >>> pattern_value({"layers.0.q": 4, r"layers\.\d+\.q": 2}, "model.layers.1.q", 8)
        2
        >>> pattern_value({"q": 4}, "model.layers.1.qq", 8)
        8
    """
    for key, value in patterns.items():
        if pattern_matches(key, path):
            return value
    return patterns.get(path, default)


def matcher(names: Sequence[str] | str) -> Callable[[str], bool]:
    """Make a test of paths. A path passes if it ends with one of the names, or if all of it matches the expression."""
    if isinstance(names, str):
        expression = re.compile(names)
        return lambda path: expression.fullmatch(path) is not None
    exact, ends = frozenset(names), tuple(f".{name}" for name in names)
    return lambda path: path in exact or path.endswith(ends)


def names_of_exactly(paths: Sequence[str], others: Iterable[str] | None) -> list[str] | str:
    r"""``target_modules`` that match ``paths`` and none of ``others``.

    A list of names also matches the ends of paths. An expression matches whole paths only.

    Args:
        paths: paths of the layers.
        others: paths that must not match. Those that are also in ``paths`` are ignored. None: they are unknown.

    Returns:
        ``paths`` as a list, or as an expression if a list would match more or ``others`` are unknown.

    Example:
        >>> names_of_exactly(["0", "block.0"], ["0", "block.0", "block"])
        ['0', 'block.0']
        >>> names_of_exactly(["0", "2"], ["0", "2", "block.0"])
        '0|2'
    """
    means, own = matcher(paths), frozenset(paths)
    if not paths or others is not None and not any(means(other) for other in others if other not in own):
        return list(paths)
    return "|".join(map(re.escape, paths))


def saved_module_of(name: str, names: Sequence[str], is_module: Callable[[str], bool]) -> str | None:
    """The path of the module that trains in full and holds the tensor ``name`` of a file. None if there is none.

    If several modules match ``names``, it is the outermost. Names match whole components of a path. PEFT also matches
    the ends of components, so its files may hold more modules.

    Example:
        >>> saved_module_of("bert.classifier.weight", ["classifier"], lambda path: True)
        'bert.classifier'
        >>> saved_module_of("pre_classifier.weight", ["classifier"], lambda path: True)  # PEFT has saved it
        'pre_classifier'
        >>> saved_module_of("encoder.weight", ["classifier"], lambda path: True) is None
        True
    """
    outer = [name[: match.start()] for match in re.finditer(r"\.", name)]
    for means in (matcher(names), by_letters(names)):
        if found := next((path for path in outer if means(path) and is_module(path)), None):
            return found
    return None


def by_letters(names: Sequence[str]) -> Callable[[str], bool]:
    """Make PEFT's test of paths for ``modules_to_save``: a path passes if its text ends with one of the names."""
    ends = tuple(names)
    return lambda path: path.endswith(ends)


def by_ends(paths: Iterable[str]) -> dict[str, list[str]]:
    """Map each name to the paths that it matches in a list. The names are all paths and all ends of paths."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        for first in range(len(parts)):
            found.setdefault(".".join(parts[first:]), []).append(path)
    return found


def in_layers(path: str, names: list[str] | str, config: LoraConfig) -> bool:
    """Whether ``path`` lies in one of ``layers_to_transform``, or is one of ``names`` in full."""
    wanted = config.layers_to_transform
    if wanted is None or (isinstance(names, list) and path in names):
        return True
    return layer_index(path, config.layers_pattern) in ([wanted] if isinstance(wanted, int) else wanted)


def layer_index(path: str, layers_pattern: list[str] | str | None) -> int | None:
    """The index, for ``layers_to_transform``, of the layer that ``path`` lies in. None if it lies in no layer.

    Example:
        >>> layer_index("model.layers.3.mlp.up", None), layer_index("model.h.3.mlp", ["layers"])
        (3, None)
    """
    if layers_pattern is None:
        expressions = [r".*?\.[^.]*\.(?P<index>\d+)\.", r"[^.]*\.(?P<index>\d+)\."]
    else:
        given = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        expressions = [rf"(?:^|.*?\.){each}\.(?P<index>\d+)\." for each in given]
    found = next((match for each in expressions if (match := re.match(each, path))), None)
    return None if found is None else int(found["index"])


def within(path: str, outer: Iterable[str]) -> bool:
    """Whether ``path`` is one of ``outer`` or lies in one."""
    return any(path == each or path.startswith(f"{each}.") for each in outer)


@functools.lru_cache(maxsize=16384)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def pattern_matches(key: str, path: str) -> bool:
    """Whether a key of a pattern, as an expression, matches the end of ``path``."""
    return _compiled(key).match(path) is not None
