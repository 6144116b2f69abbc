"""Merging adapters into the base weights, and the checks before it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from rankwise.attach.attachment import adapter_layers, saved_modules
from rankwise.attach.targets import find_tied
from rankwise.attach.unused_layers import why_unlike_its_class
from rankwise.parallel.flattened import refuse_flattened
from rankwise.parallel.sharded import shared_out


def merge(model: nn.Module, names: list[str], safe_merge: bool, for_good: bool = False) -> None:
    """Add the updates of the adapters ``names`` to the base weights, or refuse; see `PeftModel.merge_adapter`.

    With ``for_good`` nothing is kept for `unmerge_adapter`.
    """
    refuse_sharded(model, "merge_adapter")
    layers = {path: layer for path, layer in adapter_layers(model).items() if any(map(layer.acts, names))}
    _refuse_shared(model, layers)
    for path, layer in layers.items():
        if reason := why_unlike_its_class(layer, same_numbers=True):
            raise ValueError(
                f"{path!r}: {reason}, so with a merged weight its output would be another. Keep the adapter unmerged."
            )
        try:
            layer.check_merge(names, finite=safe_merge)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
    rounded = [path for path, layer in layers.items() if layer.requantizes]
    if rounded:
        warnings.warn(
            f"{len(rounded)} of the layers that are merged into are quantized ({rounded[0]!r}, ...). They are "
            "quantized again, which rounds what the adapter has learned. To merge without rounding, load the "
            "base model unquantized, load the adapter into that, and merge.",
            stacklevel=3,
        )
    for layer in layers.values():
        layer.merge([name for name in names if name in layer.lora_A], for_good)


def refuse_sharded(model: nn.Module, method: str) -> None:
    """Refuse a method that needs whole weights."""
    refuse_flattened(model, method, "Save the adapter and load it into a whole model.")
    if shared_out(model):
        raise ValueError(
            f"`{method}` can't work on a model that is sharded over processes. Save the "
            "adapter with `save_pretrained`, called by all processes, and load it into a whole model."
        )


def _refuse_shared(model: nn.Module, paths: Iterable[str], inside: str | None = None) -> None:
    """Refuse to change weights that are shared with other modules. Modules ``inside`` the same one do not count."""
    for path, sharing in find_tied(model, paths).items():
        others = [other for other in sharing if not inside or not f"{other}.".startswith(f"{inside}.")]
        if not others:
            continue
        raise ValueError(
            f"The weight of {path!r} is shared with {others[0]!r}, which merging would change too. Keep the "
            f"adapter unmerged, or untie them first: give {others[0]!r} a copy of its own, "
            "`module.weight = torch.nn.Parameter(module.weight.detach().clone())`, and set "
            "`model.config.tie_word_embeddings = False` if the configuration has it."
        )


def refuse_shared_copies(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse to replace a module by an adapter's copy of it if it shares weights with others."""
    for path, module in saved_modules(model).items():
        if any(name in module.modules_to_save for name in names):
            inner = [name for name, _ in module.named_modules() if not name.startswith("modules_to_save")]
            _refuse_shared(model, [f"{path}.{name}" if name else path for name in inner], inside=path)
