"""Wrappers around modules: the names that they insert into paths, and those that an adapter must be attached before."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")
_AVERAGES = ("DistributedDataParallel", "DeepSpeedEngine", "FullyShardedDataParallel", "FSDPModule")
_NO_AVERAGES = (
    "which would not average the gradients of an adapter that is attached later, so that every process would train "
    "another adapter. Attach the adapter first, and wrap or shard the model afterwards."
)
_NAMED = (
    "whose name would be in the names of the adapter's layers, so that its file would fit no other model. Attach the "
    "adapter to the model inside (`.module`), and wrap the model afterwards."
)


def without(name: str, parts: Collection[str] = WRAPPERS) -> str:
    """Remove ``parts`` from the name of a module or parameter. The last part of the name always stays.

    Example:
        >>> without("layers.0._orig_mod.fc.weight"), without("my_orig_mod.fc.weight")
        ('layers.0.fc.weight', 'my_orig_mod.fc.weight')
    """
    *owners, last = name.split(".")
    return ".".join([*(part for part in owners if part not in parts), last])


def refuse_wrapped(model: nn.Module, layers: Iterable[str], attached: bool = False) -> None:
    """Refuse to train adapters of ``layers``, by path, that are in a wrapper which averages gradients over processes.

    Args:
        model: the model that has, or gets, the adapter.
        layers: paths of the adapted layers.
        attached: whether the adapter is attached already. ``DataParallel`` is then accepted.

    Raises:
        ValueError: a layer is in such a wrapper, which knows only the parameters that it has found when it was made;
            or in ``DataParallel``.
    """
    reasons = dict.fromkeys(_AVERAGES, _NO_AVERAGES) | ({} if attached else {"DataParallel": _NAMED})
    paths = list(layers)
    for name, module in model.named_modules():
        kind = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in reasons), None)
        inside = f"{without(name)}." if name else ""
        if kind is not None and any(path.startswith(inside) for path in paths):
            raise ValueError(f"{repr(name) if name else 'The model'} is in {kind} already, {reasons[kind]}")
