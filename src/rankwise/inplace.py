"""Give an object new methods by giving it a subclass made on the spot, and take them away again.

The object keeps its identity, its attributes and every ``isinstance`` relation that it had; only ``type(obj)``
changes. The new class keeps the old one's name and module, because libraries look models up by class name.
"""

from __future__ import annotations

import copyreg
import functools
from typing import Any


class InPlace:
    """First base of every class made by `add_methods`; lets such objects be copied and pickled."""

    _mixin: type
    _original_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(protocol, 2))  # type: ignore[assignment]
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(
                f"{self._original_class.__name__} defines its own pickling, which an adapted object can't keep. "
                "Save it with `save_pretrained` or `state_dict()` instead."
            )
        return (_new, (self._mixin, self._original_class), *reduced[2:])


def add_methods(obj: Any, mixin: type) -> None:
    """Change ``obj``'s class to a subclass of ``mixin`` and of its present class."""
    cls: Any = type(obj)
    obj.__class__ = _subclass(mixin, cls)


def remove_methods(obj: Any) -> None:
    """Give ``obj`` back the class that it had before `add_methods`.

    Raises:
        ValueError: something else (such as ``fully_shard``) has changed the class since.
    """
    if "_original_class" not in vars(type(obj)):
        raise ValueError(
            f"This {type(obj).__name__} was given another class (sharded?) after its adapters were attached; "
            "its adapters can't be removed. Save the adapter and load it into a fresh model."
        )
    obj.__class__ = obj._original_class


@functools.cache
def _subclass(mixin: Any, original: Any) -> type:
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_mixin": mixin,
        "_original_class": original,
    }
    return type(original.__name__, (mixin, original), names)


def _new(mixin: type, original: type) -> Any:
    made: Any = _subclass(mixin, original)
    return made.__new__(made)
