"""The parameters that ``target_parameters`` means, and a warning about experts that no target covers.

Names match as in PEFT: a whole name, or its last parts. Names that PEFT ignores silently are an error or a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from rankwise.adapters import AdapterLayer, ParameterSlot, slot_of
from rankwise.config import LoraConfig
from rankwise.config.suggest import suggestion

_EXPERTS = ("expert", "moe")  # parts of names of classes and modules that hold experts' weights


def find_parameters(
    modules: Mapping[str, nn.Module], config: LoraConfig, adapted: Iterable[str], saved: Sequence[str]
) -> dict[str, ParameterSlot]:
    """The parameters that ``config`` adapts, by path, in the model's order.

    Args:
        modules: every module of the model, by path, without the modules that adapters have added.
        config: the configuration.
        adapted: paths of the layers that ``config`` adapts as modules.
        saved: paths of the modules that train in full. Parameters in them are left out.

    Raises:
        ValueError: a name matches a parameter that cannot be adapted, or no name matches any.

    Warns:
        UserWarning: a name matches no parameter, while others do.
    """
    names = config.target_parameters or []
    if not names:
        return {}
    own = dict(_own_parameters(modules))
    found = [path for path in own if _matches(path, names)]
    missing = [name for name in names if not any(_matches(path, [name]) for path in found)]
    _tell_of_missing(missing, names, own, config)
    slots: dict[str, ParameterSlot] = {}
    for path in found:
        owner_path = path.rpartition(".")[0]
        if any(f"{owner_path}.".startswith(f"{each}.") for each in saved):
            continue
        if owner_path in set(adapted) or isinstance(modules[owner_path], AdapterLayer):
            raise ValueError(
                f"`target_parameters` names {path!r}, whose layer {owner_path!r} is adapted already: take one of them "
                "out. With `target_modules=[]`, only parameters are adapted."
            )
        try:
            slots[path] = slot_of(*own[path])
        except ValueError as error:
            raise ValueError(f"`target_parameters` names {path!r}: {error}") from None
    if not slots:
        raise ValueError(
            f"`target_parameters`={names}: all that they match is in modules that train in full "
            f"({', '.join(map(repr, saved))})."
        )
    return slots


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``, or the slot of the parameter at ``path``."""
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    return slot_of(owner, name) if name in owner._parameters else model.get_submodule(path)


def in_model_order(names: list[str], slots: Iterable[str]) -> list[str]:
    """Sort ``target_parameters`` by the order of the parameters in the model. A file's nesting follows this order.

    Example:
        >>> in_model_order(["experts.b", "experts.a"], ["layers.0.experts.a", "layers.0.experts.b"])
        ['experts.a', 'experts.b']
    """
    paths = list(slots)
    places = {
        name: next((n for n, p in enumerate(paths) if _matches(p, [name])), len(paths)) for name in names
    }
    return sorted(names, key=places.__getitem__)


def tell_of_experts(modules: Mapping[str, nn.Module], slots: Iterable[str]) -> None:
    """Warn of stacks of experts' weights that "all-linear" leaves out because they are not linear layers."""
    adapted = set(slots)
    left = {
        path: owner._parameters[name]
        for path, (owner, name) in _own_parameters(modules)
        if path not in adapted and is_expert_stack(path, owner, name)
    }
    if not left:
        return
    names = sorted({".".join(path.split(".")[-2:]) for path in left}, reverse=True)
    total = sum(p.numel() for module in modules.values() for p in module.parameters(recurse=False))
    share = sum(p.numel() for p in left.values() if p is not None) / max(total, 1)
    warnings.warn(
        f"`target_modules`='all-linear' adapts linear layers, and the experts of this model are not: {len(left)} "
        f"stacks of weights with {share:.0%} of the model's parameters are left out. To adapt them, add "
        f"`target_parameters={names}`.",
        UserWarning,
        stacklevel=4,
    )


def is_expert_stack(path: str, owner: nn.Module, name: str) -> bool:
    """Whether a parameter holds the weights of several experts, judged by names and shape."""
    parameter = owner._parameters[name]
    called = f"{type(owner).__name__}.{path.rpartition('.')[0].rpartition('.')[2]}".lower()
    return parameter is not None and parameter.dim() == 3 and any(each in called for each in _EXPERTS)


def _own_parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Path of every parameter, with the module that holds it and its name in that module."""
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}", (module, name)


def _matches(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _tell_of_missing(missing: list[str], names: list[str], own: Iterable[str], config: LoraConfig) -> None:
    for name in missing:
        parts = name.count(".") + 1
        ends = dict.fromkeys(".".join(path.split(".")[-parts:]) for path in own)
        message = f"`target_parameters` names {name!r}, but the model has no such parameter.{suggestion(name, ends)}"
        if len(missing) == len(names):
            raise ValueError(message)
        if not config.inference_mode:
            warnings.warn(message, UserWarning, stacklevel=5)
