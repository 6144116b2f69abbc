"""Whole modules that train together with the adapters: ``modules_to_save``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rankwise.adapters.inplace import InPlace, add_methods, has_forward_of_its_own, remove_methods
from rankwise.parallel.ddp import note_use


class SavedModule(InPlace, nn.Module):
    """Mixin for a module that has a trained copy for each adapter. The active adapter's copy replaces it.

    The module's own parameters stay frozen under their own names; the copies are at
    ``modules_to_save.<adapter>``. Code that reads ``weight`` and ``bias`` without calling the module, as fused
    losses do with an output layer, gets those of the copy that acts.
    """

    modules_to_save: nn.ModuleDict
    active_adapter: str | None
    adapters_enabled: bool

    def add_copy(self, name: str, widens: bool = True) -> None:
        """Make adapter ``name``'s own copy of the module as it is without adapters.

        ``widens``: a half-precision module gets a float32 copy.
        """
        self._check_can_train()
        held, self.modules_to_save = self.modules_to_save, nn.ModuleDict()
        try:
            with _without_hooks(self):
                made = copy.deepcopy(self)
        finally:
            self.modules_to_save = held
        _remove_saved_methods(made)
        made.requires_grad_(False)
        for values in (*made.parameters(), *made.buffers()):
            if widens and values.is_floating_point() and values.element_size() < 4:
                values.data = values.data.float()
        self.modules_to_save[name] = made

    @property
    def weight(self) -> Any:
        return self._of_what_acts("weight")

    @weight.setter
    def weight(self, value: Any) -> None:
        self._refuse_to_set("weight")

    @property
    def bias(self) -> Any:
        return self._of_what_acts("bias")

    @bias.setter
    def bias(self, value: Any) -> None:
        self._refuse_to_set("bias")

    def _refuse_to_set(self, name: str) -> None:
        """A parameter can be set; only FullyShardedDataParallel and nn.DataParallel set mere tensors."""
        raise ValueError(
            f"`{name}` of a {type(self).__name__} in `modules_to_save` can't become a plain tensor. "
            "FullyShardedDataParallel (FSDP version 1) and nn.DataParallel would make it one: use `fully_shard` (FSDP "
            "version 2) or DistributedDataParallel (`torchrun`), or leave `modules_to_save` out."
        )

    def _of_what_acts(self, name: str) -> Any:
        made = self._acting_copy()
        return nn.Module.__getattr__(self, name) if made is None else getattr(made, name)

    def _acting_copy(self) -> nn.Module | None:
        name = self.active_adapter
        if not self.adapters_enabled or name is None or name not in self.modules_to_save:
            return None
        return self.modules_to_save[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self._acting_copy()
        if made is not None:
            note_use(made.parameters())
            return self._run(made, args, kwargs)
        return super().forward(*args, **kwargs)

    def run_with(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call adapter ``name``'s copy, or the module itself where it has none."""
        if name is not None and name in self.modules_to_save:
            return self._run(self.modules_to_save[name], args, kwargs)
        # Otherwise `weight` would be that of the copy that acts.
        enabled, self.adapters_enabled = (
            self.adapters_enabled,
            False,
        )
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.adapters_enabled = enabled

    def _check_can_train(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.is_meta and any("_hf_hook" in vars(module) for module in self.modules()):
                raise ValueError(
                    f"`modules_to_save` takes a {type(self).__name__} that Accelerate has offloaded ({name!r} is not "
                    "here), so it can't train. Give it a device in `device_map`."
                )
            if not parameter.is_floating_point() and not name.startswith("modules_to_save."):
                raise ValueError(
                    f"`modules_to_save` takes a {type(self).__name__} whose {name!r} is quantized "
                    f"({parameter.dtype}), so it can't train. Leave it out of the quantization, with "
                    "`llm_int8_skip_modules` or `modules_to_not_convert` in the quantization's configuration."
                )

    def _run(self, made: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a copy in its own precision, and convert its output to the precision of the model around it."""
        own, wide = _dtype(self), _dtype(made)
        if own is None or wide is None or own == wide:
            return made(*args, **kwargs)
        output = made(*_cast(args, None, wide), **_cast(kwargs, None, wide))
        return _cast(output, wide, own)


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Take Accelerate's hooks off a module and its parts for a while, so that a copy does not hold the hooks' data."""
    names = ("forward", "_old_forward", "_hf_hook")
    taken = [
        (each, {name: vars(each).pop(name) for name in names if name in vars(each)})
        for each in module.modules()
        if "_hf_hook" in vars(each)
    ]
    try:
        yield
    finally:
        for each, attributes in taken:
            vars(each).update(attributes)


def prepare_saved_module(module: nn.Module) -> SavedModule:
    """Turn ``module`` into a `SavedModule` in place, with no copies yet."""
    if not isinstance(module, SavedModule):
        if has_forward_of_its_own(module):
            raise ValueError(
                f"The `forward` of this {type(module).__name__} has been replaced on the object itself, which would "
                "hide its copies. Give the module a class of its own instead."
            )
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
            held = module.get_buffer(key)
            held.data = buffer.data.to(held.dtype)


def _dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the module's first floating-point parameter; its own come before those of its copies."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _cast(values: Any, before: torch.dtype | None, after: torch.dtype) -> Any:
    """Floating-point tensors of dtype ``before`` (None: of any) in nested ``values`` as ``after``."""

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(after) if floating and before in (None, value.dtype) else value

    return tree_map(cast, values)
