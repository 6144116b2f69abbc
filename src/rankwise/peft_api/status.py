"""PEFT's `get_layer_status` and `get_model_status`: which adapters are attached where, and their state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from rankwise.adapters import AdapterLayer
from rankwise.adapters.saved import SavedModule
from rankwise.attach.attachment import adapter_layers, saved_modules

Irregular = Literal["irregular"]


@dataclass
class LayerStatus:
    """The state of one adapted layer, or of one module that trains in full.

    Args:
        name: path of the layer in the model.
        module_type: "lora." and the class of an adapted layer, or "modules_to_save".
        enabled: whether adapters are enabled in the layer.
        active_adapters: names of the active adapters.
        merged_adapters: names of the adapters that are merged into the layer's weight.
        requires_grad: whether each adapter's parameters in the layer train. "irregular": only some of them do.
        available_adapters: names of all adapters of the layer.
        devices: kinds of device that hold each adapter's parameters, such as "cuda".
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass
class ModelStatus:
    """The state of an adapted model as a whole. A value is "irregular" if the layers differ.

    Args:
        base_model_type: name of the model's class.
        peft_types: kind of each adapter, "LORA" or "ADALORA".
        trainable_params: number of parameters that train.
        total_params: number of all parameters.
        num_adapter_layers: number of layers that are adapted or train in full.
        enabled: whether adapters are enabled.
        active_adapters: names of the active adapters.
        merged_adapters: names of the merged adapters.
        requires_grad: whether each adapter's parameters train.
        available_adapters: names of all adapters.
        devices: kinds of device that hold each adapter's parameters, such as "cuda".
    """

    base_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """Return the state of each adapted layer and of each module that trains in full.

    Args:
        model: a model, or a part of one.

    Returns:
        A `LayerStatus` for each layer, in the model's order.

    Raises:
        ValueError: the model has no adapted layer.

    Example:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["0"]))
        >>> (status,) = get_layer_status(model)
        >>> status.name, status.module_type, status.active_adapters, status.requires_grad
        ('0', 'lora.Linear', ['default'], {'default': True})
    """
    found: dict[str, AdapterLayer | SavedModule] = {**adapter_layers(model), **saved_modules(model)}
    if not found:
        raise ValueError("No adapter layers found in the model: call `rankwise.get_peft_model` first.")
    paths = {id(module): place for place, module in enumerate(model.modules())}
    return [
        _of_layer(path, module)
        for path, module in sorted(found.items(), key=lambda item: paths.get(id(item[1]), -1))
    ]


def _of_layer(path: str, module: AdapterLayer | SavedModule) -> LayerStatus:
    if isinstance(module, SavedModule):
        own = {name: list(copy.parameters()) for name, copy in module.modules_to_save.items()}
        active = [] if module.active_adapter is None else [module.active_adapter]
        kind, merged = "modules_to_save", []
    else:
        own = {name: list(module.adapter_parameters(name).values()) for name in module.lora_A}
        active, merged = list(module.active_adapters), list(module.merged_adapters)
        kind = f"lora.{getattr(type(module), '_original_class', type(module)).__name__}"
    return LayerStatus(
        name=path,
        module_type=kind,
        enabled=module.adapters_enabled,
        active_adapters=active,
        merged_adapters=merged,
        requires_grad={
            name: _common(p.requires_grad for p in parameters) for name, parameters in own.items()
        },
        available_adapters=sorted(own),
        devices={name: sorted({p.device.type for p in parameters}) for name, parameters in own.items()},
    )


def get_model_status(model: Any) -> ModelStatus:
    """Return the state of an adapted model as a whole.

    Args:
        model: the adapted model.

    Returns:
        A `ModelStatus`.

    Raises:
        ValueError: the model has no adapter.

    Example:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["0"]))
        >>> status = get_model_status(model)
        >>> status.enabled, status.active_adapters, status.trainable_params, status.total_params
        (True, ['default'], 16, 36)
    """
    layers = get_layer_status(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    trainable, total = model.get_nb_trainable_parameters()
    # A layer counts for an adapter only if it holds the adapter.
    active = [[n for n in each.active_adapters if n in each.available_adapters] for each in layers]
    acting = sorted({name for some in active for name in some})
    complete = all(
        set(some) >= {name for name in acting if name in each.available_adapters}
        for some, each in zip(active, layers, strict=True)
    )
    merged = sorted({name for each in layers for name in each.merged_adapters})
    merging = [each for each in layers if each.module_type != "modules_to_save"]
    all_merged = all(
        set(merged) & set(each.available_adapters) <= set(each.merged_adapters) for each in merging
    )
    return ModelStatus(
        base_model_type=getattr(type(model), "_original_class", type(model)).__name__,
        peft_types={name: config.peft_type.value for name, config in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(each.enabled for each in layers),
        active_adapters=acting if complete else "irregular",
        merged_adapters=merged if all_merged else "irregular",
        requires_grad={
            name: _common(each.requires_grad[name] for each in layers if name in each.requires_grad)
            for name in names
        },
        available_adapters=names,
        devices={
            name: sorted({kind for each in layers for kind in each.devices.get(name, ())}) for name in names
        },
    )


def _common(values: Iterable[bool | Irregular]) -> bool | Irregular:
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"
