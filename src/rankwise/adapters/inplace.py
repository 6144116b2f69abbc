"""Give an object new methods by giving it a subclass made on the spot, and take them away again.

The object keeps its identity, its attributes and every ``isinstance`` relation that it had; only ``type(obj)``
changes. The new class keeps the old one's name and module, because libraries look models up by class name.
"""

from __future__ import annotations

import copyreg
import functools
from types import MethodType
from typing import Any

_FORWARDS = ("forward", "_old_forward")


class InPlace:
    """First base of every class made by `add_methods`; lets such objects be copied and pickled."""

    _mixin: type
    _original_class: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new object of an adapted one's class, as ``type(model)(config)`` makes: one without adapters."""
        if "_original_class" not in vars(cls):
            return cls._from_scratch(*args, **kwargs)
        return cls._original_class(*args, **kwargs)

    @classmethod
    def _from_scratch(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{cls.__name__} gives methods to an object that exists: it makes none.")

    def _replicate_for_data_parallel(self) -> Any:
        """A replica for ``nn.DataParallel``, which would make it by `__new__`."""
        cls = type(self)
        self.__class__ = self._original_class
        try:
            replica: Any = self._replicate_for_data_parallel()
        finally:
            self.__class__ = cls
        replica.__class__ = cls
        return replica

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
    _rebind_forward(obj, cls)


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
    made = type(obj)
    obj.__class__ = obj._original_class
    _rebind_forward(obj, made)


def has_forward_of_its_own(obj: Any) -> bool:
    """Whether the object has its own ``forward``, so that changing its class would change nothing.

    Accelerate's hooks set one, too, but call the class's ``forward``, which they keep as ``_old_forward``.
    """
    return "forward" in vars(obj) and not any(_is_of_class(obj, name, type(obj)) for name in _FORWARDS)


def _is_of_class(obj: Any, name: str, cls: Any) -> bool:
    held = vars(obj).get(name)
    return (
        isinstance(held, MethodType)
        and held.__self__ is obj
        and held.__func__ is getattr(cls, "forward", None)
    )


def _rebind_forward(obj: Any, before: type) -> None:
    """If the object holds the ``forward`` of its class ``before``, replace it by that of its present class."""
    for name in _FORWARDS:
        if _is_of_class(obj, name, before):
            vars(obj)[name] = MethodType(type(obj).forward, obj)


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
    new = next(each for each in made.__mro__ if each is not InPlace and "__new__" in vars(each))
    return new.__new__(made)
