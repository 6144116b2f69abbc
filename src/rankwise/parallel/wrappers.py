"""Module names that ``torch.compile``, ``checkpoint_wrapper`` and FSDP insert into paths, and their removal."""

from __future__ import annotations

from collections.abc import Collection

WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")


def without(name: str, parts: Collection[str] = WRAPPERS) -> str:
    """Remove ``parts`` from the name of a module or parameter. The last part of the name always stays.

    Example:
        >>> without("layers.0._orig_mod.fc.weight"), without("my_orig_mod.fc.weight")
        ('layers.0.fc.weight', 'my_orig_mod.fc.weight')
    """
    *owners, last = name.split(".")
    return ".".join([*(part for part in owners if part not in parts), last])
