"""Costs of a training step that are the same on any machine: tensor operations, and bytes saved for backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_NOTHING = {"aten::_unsafe_view", "aten::detach", "aten::empty", "aten::empty_like"}


class Operations(TorchDispatchMode):
    """Counts tensor operations by name. Views and allocations are left out, because they compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = function._schema.returns
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        if not views and function._schema.name not in _NOTHING:
            self.names[function._schema.name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        """The total number of operations."""
        return self.names.total()


class Saved:
    """The storages that were saved, each counted once."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._tensors: dict[int, Tensor] = {}  # kept alive, so that no other storage gets the same address

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor, unless it is one of the model's parameters."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self._parameters:
            self._tensors.setdefault(address, tensor)
        return tensor

    @property
    def bytes(self) -> int:
        """The total size of the storages."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Saved]:
    """Collect what forward passes in this context save for backward, except ``model``'s parameters."""
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved
