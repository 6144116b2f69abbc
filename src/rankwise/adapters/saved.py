"""Whole modules that train beside the adapters: ``modules_to_save``."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from rankwise.inplace import InPlace, add_methods, remove_methods


class SavedModule(InPlace, nn.Module):
    """Mixin for a module that is replaced, adapter by adapter, by a copy of its own that trains.

    The module's own parameters stay frozen under their own names; the copies are at
    ``modules_to_save.<adapter>``.
    """

    modules_to_save: nn.ModuleDict
    active_adapter: str | None
    adapters_enabled: bool

    def add_copy(self, name: str) -> None:
        """Make adapter ``name``'s own copy of the module as it is without adapters, in float32 if it was half."""
        held, self.modules_to_save = self.modules_to_save, nn.ModuleDict()
        try:
            made = copy.deepcopy(self)
        finally:
            self.modules_to_save = held
        _remove_saved_methods(made)
        for parameter in made.parameters():
            if parameter.is_floating_point() and parameter.element_size() < 4:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(False)
        self.modules_to_save[name] = made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.active_adapter
        if self.adapters_enabled and name is not None and name in self.modules_to_save:
            made = self.modules_to_save[name]
            return made(*_cast(made, args), **kwargs)
        return super().forward(*args, **kwargs)


def prepare_saved_module(module: nn.Module) -> SavedModule:
    """Turn ``module`` into a `SavedModule` in place, with no copies yet."""
    if not isinstance(module, SavedModule):
        module.modules_to_save = nn.ModuleDict()
        module.active_adapter, module.adapters_enabled = None, True  # type: ignore[assignment]
        add_methods(module, SavedModule)
    return module  # type: ignore[return-value]


def _remove_saved_methods(module: nn.Module) -> None:
    remove_methods(module)
    del module.modules_to_save, module.active_adapter, module.adapters_enabled


def restore_saved_module(module: SavedModule, name: str | None = None) -> None:
    """Give the module its class back; its weights become those of copy ``name``, if given."""
    made = module.modules_to_save[name] if name is not None and name in module.modules_to_save else None
    _remove_saved_methods(module)
    if made is not None:
        for key, parameter in made.named_parameters():
            own = module.get_parameter(key)
            own.data = parameter.data.to(own.dtype)
        for key, buffer in made.named_buffers():
            module.get_buffer(key).data = buffer.data


def _cast(made: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    parameter = next((p for p in made.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return args
    return tuple(
        arg.to(parameter.dtype) if hasattr(arg, "is_floating_point") and arg.is_floating_point() else arg
        for arg in args
    )
