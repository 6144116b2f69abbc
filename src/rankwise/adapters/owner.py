"""The module whose parameters are adapted: in its forward, it reads them with their updates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rankwise.adapters.inplace import InPlace, add_methods, remove_methods
from rankwise.adapters.summed import SummedWeight
from rankwise.parallel.ddp import keep_in_graph

SLOTS = "adapted_parameters"  # where the module holds a slot for each of its adapted parameters

# Transformers' implementations of experts that use PyTorch's products. Others, such as kernels from
# the hub, see only memory.
_READ_BY_PRODUCTS = ("eager", "batched_mm", "grouped_mm", None)


class Slot(Protocol):
    """The owner's view of one of its adapted parameters. `rankwise.adapters.parameter` implements it."""

    parameter_name: str

    def summed(self) -> SummedWeight | None:
        """The parameter with the updates that act on it, for one forward pass. None if no update acts."""

    def idle_parameters(self) -> list[nn.Parameter]:
        """The factors of active adapters that have no rank here."""


class ParameterOwner(InPlace, nn.Module):
    """Mixin for such a module."""

    adapted_parameters: nn.ModuleDict
    _uncompiled: ClassVar[Callable[..., Any]]  # `_with_updates`, out of the compiler's sight
    _summed: dict[str, Tensor]  # the parameters that `__getattr__` returns while the forward runs

    def __getattr__(self, name: str) -> Any:
        summed = self.__dict__.get("_summed")
        if summed is not None and name in summed:
            return summed[name]
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._uncompiled(args, kwargs)
        return self._with_updates(args, kwargs)

    def _with_updates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        slots: list[Slot] = list(self.adapted_parameters.values())  # type: ignore[arg-type]
        sums = {slot.parameter_name: slot.summed() for slot in slots}
        summed: dict[str, Any] = {name: weight for name, weight in sums.items() if weight is not None}
        idle = [parameter for slot in slots for parameter in slot.idle_parameters()]
        way = getattr(getattr(self, "config", None), "_experts_implementation", None)
        if summed and way not in _READ_BY_PRODUCTS:
            _tell_of_kernel(way)
            summed = {name: weight.formed() for name, weight in summed.items()}
        before = self.__dict__.get("_summed")
        self.__dict__["_summed"] = summed
        try:
            output = super().forward(*args, **kwargs)
        finally:
            self.__dict__["_summed"] = before
        return _with_part(output, idle) if idle else output


def add_slot(owner: nn.Module, name: str, slot: nn.Module) -> None:
    """Let ``owner`` read its parameter ``name`` through ``slot``."""
    if not hasattr(ParameterOwner, "_uncompiled"):  # imported late, because importing the compiler takes time
        ParameterOwner._uncompiled = torch.compiler.disable(ParameterOwner._with_updates)
    if not isinstance(owner, ParameterOwner):
        owner._modules[SLOTS] = nn.ModuleDict()
        add_methods(owner, ParameterOwner)
    slots: Any = owner._modules[SLOTS]
    slots[name] = slot
    for each in [each for each in owner._parameters if each in slots]:  # in the order of the parameters
        slots[each] = slots.pop(each)


def remove_slot(owner: nn.Module, name: str) -> None:
    """Undo `add_slot`."""
    slots: Any = owner._modules[SLOTS]
    del slots[name]
    if not slots:
        remove_methods(owner)
        del owner._modules[SLOTS]
        owner.__dict__.pop("_summed", None)


def _tell_of_kernel(way: Any) -> None:
    warnings.warn(
        f"experts_implementation={way!r} can't see the adapters, so each forward pass forms the sum of the experts' "
        "weights and their updates for it, which takes as much memory again as the weights. "
        "`model.set_experts_implementation('grouped_mm')` needs none of it.",
        stacklevel=3,
    )


def _with_part(output: Any, parameters: list[nn.Parameter]) -> Any:
    if isinstance(output, Tensor):
        return keep_in_graph(output, parameters)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (keep_in_graph(output[0], parameters), *output[1:])
    return output
