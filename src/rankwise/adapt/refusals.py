"""Refuses PEFT adapters whose meaning would change if directions were rotated or cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from rankwise.adapt.peft_pairs import PeftPair, lora_layers, peft_pairs
from rankwise.parallel.zero import shape_of
from rankwise.run.pairs import KEYS, FactorPair

# Starts whose update is 0, or that change only A and B.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def check_model(model: Any) -> None:
    """Check that ``model`` has a LoRA adapter of PEFT.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no LoRA adapter of PEFT.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module with a LoRA adapter of PEFT, or a list of FactorPairs, but is a "
            f"{type(model).__name__}."
        )
    if getattr(model, "_rankwise_controller", None) is not None:
        raise ValueError(
            "This model has rankwise's own layers, whose ranks adapt by themselves. `adapt_ranks` is for PEFT's."
        )
    if hasattr(type(model), "allocation_state"):
        raise ValueError(
            "This model has rankwise's own LoRA layers, whose ranks are fixed. Attach `rankwise.AdaLoraConfig` for "
            "ranks that adapt; or attach the adapter with PEFT, whose layers `adapt_ranks` is for."
        )
    configs = getattr(model, "peft_config", None)
    if not configs or next(lora_layers(model), None) is None:
        kinds = {getattr(each, "peft_type", None) for each in configs.values()} if configs else set()
        names = ", ".join(sorted(str(getattr(kind, "value", kind)) for kind in kinds))
        has = f"has adapters of the kind {names}" if names else "has no adapter"
        raise ValueError(
            f"This {type(model).__name__} {has}, but only LoRA's ranks can be adapted. Attach one first: "
            "`peft.get_peft_model(model, peft.LoraConfig(r=8, ...))`."
        )


def chosen_adapter(model: Any, adapter: str | None) -> str:
    """Return the name of the adapter to adapt: ``adapter``, or the active one.

    Raises:
        ValueError: the adapter does not exist, or several adapters are active.
    """
    names = list(model.peft_config)
    if adapter is not None:
        if adapter not in names:
            raise ValueError(f"There is no adapter {adapter!r}; the model has {sorted(names)}.")
        return adapter
    active = getattr(model, "active_adapters", names)
    active = active() if callable(active) else active  # Transformers has a method of this name
    active = [active] if isinstance(active, str) else list(active)
    if len(active) != 1:
        raise ValueError(f"The adapters {sorted(active)} are active: say which one to adapt, `adapter=...`.")
    return str(active[0])


def check_trains(model: nn.Module, adapter: str) -> None:
    """Check that an adapter trains.

    Raises:
        ValueError: all its factors are frozen.
    """
    pairs = peft_pairs(model, adapter)
    if pairs and not any(pair.parameter(key).requires_grad for pair in pairs for key in KEYS):
        raise ValueError(
            f"The adapter {adapter!r} is frozen, so its ranks can't adapt. If you loaded it, pass "
            "`is_trainable=True` to `PeftModel.from_pretrained`. Otherwise activate it with `model.set_adapter(...)`."
        )


def check_adapter(config: Any, adapter: str, pairs: Sequence[PeftPair]) -> None:
    """Check that the ranks of an adapter can be adapted.

    Raises:
        ValueError: they cannot. The message says why, and what to do.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(
            f"The adapter {adapter!r} is of the kind {kind}, but only LoRA's ranks can be adapted: make it with "
            "`peft.LoraConfig`."
        )
    start = config.init_lora_weights
    if start == "mica":
        raise ValueError(
            "`init_lora_weights`='mica' keeps B as it is at the start, so its directions can't be rotated or cut. "
            "Leave `init_lora_weights` out (or take 'gaussian', 'orthogonal' or 'eva')."
        )
    if start not in _STARTS:
        raise ValueError(
            f"`init_lora_weights`={start!r} moves a part of the base weights into A and B, so cutting a rank would "
            "take it out of the model. Leave `init_lora_weights` out (or take 'gaussian', 'orthogonal' or 'eva')."
        )
    if getattr(config, "lora_bias", False):
        raise ValueError(
            "`lora_bias=True` adds a bias to B, which has no rank to cut: leave `lora_bias` out."
        )
    if not pairs:
        raise ValueError(f"No layer holds the adapter {adapter!r}.")
    for pair in pairs:
        _check_layer(pair, adapter)
    _check_shared(pairs)


def check_values(pairs: Sequence[PeftPair]) -> None:
    """Check that the factors have values.

    Raises:
        ValueError: they are on the meta device.
    """
    for pair in pairs:
        if pair.parameter("A").device.type == "meta":
            raise ValueError(
                f"The adapter on {pair.path!r} is on the meta device, so it has no values yet. Load them first, or "
                "attach the adapter without `low_cpu_mem_usage`."
            )


def _check_layer(pair: PeftPair, adapter: str) -> None:
    layer = pair.layer
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not type(variant).__name__.startswith("Dora"):
        raise ValueError(
            f"{pair.path!r} uses {type(variant).__name__}, a variant of LoRA that reads A or B in its own way, so "
            "its ranks can't be cut. Leave that option of LoraConfig out."
        )
    _check_scale(pair, "the adapter's scale, which `lora_alpha` or `alpha_pattern` sets,")
    if layer.merged_adapters:
        raise ValueError(
            f"The adapters {layer.merged_adapters} are merged into {pair.path!r}: call `unmerge_adapter` first."
        )
    A, B = pair.parameter("A"), pair.parameter("B")
    if not pair.is_embedding and len(B.shape) > 1 and len(A.shape) > 1 and B.numel() and A.numel():
        if B.shape[1] != A.shape[0]:
            raise ValueError(
                f"{pair.path!r} is a convolution with groups, in which B has {B.shape[1]} columns for the {A.shape[0]} "
                "ranks of A: PEFT's layout is not a product B A. Leave the layer out with `exclude_modules`."
            )


def check_pairs(pairs: Sequence[FactorPair]) -> None:
    """Check that factors of any library form products ``scale * B A``.

    Raises:
        ValueError: they don't; the message names the layer.
    """
    for pair in pairs:
        A, B = (shape_of(pair.parameter(key)) for key in KEYS)
        if len(A) < 2 or len(B) < 2 or A[0] != B[1]:
            raise ValueError(
                f"{pair.path!r}: the first dimension of A and the second of B count the same ranks, but A is "
                f"{tuple(A)} and B is {tuple(B)}."
            )
        if pair.blocks < 1 or A[0] % pair.blocks:
            raise ValueError(f"{pair.path!r}: {A[0]} ranks can't be shared evenly by `blocks`={pair.blocks}.")
        if pair.starts_at_zero not in KEYS:
            raise ValueError(
                f"{pair.path!r}: `starts_at_zero` is 'A' or 'B', but is {pair.starts_at_zero!r}."
            )
        _check_scale(pair, "`scale`")
    _check_shared(pairs)


def _check_scale(pair: FactorPair, called: str) -> None:
    scale = pair.scale
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"{pair.path!r}: {called} must be finite and not 0, but is {scale}.")


def _check_shared(pairs: Sequence[FactorPair]) -> None:
    seen: dict[int, str] = {}
    for pair in pairs:
        for key in ("A", "B"):
            parameter = pair.parameter(key)
            # PEFT's tied adapters are two parameters, of which one is the other's transpose.
            place = parameter.data_ptr() if parameter.device.type != "meta" else 0
            other = seen.setdefault(place or id(parameter), pair.path)
            if other != pair.path:
                raise ValueError(
                    f"{other!r} and {pair.path!r} share their factor {key}, so they can't have ranks of their own. "
                    "Leave one of them out, or don't tie their adapters (`ensure_weight_tying`)."
                )
