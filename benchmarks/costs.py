"""What a training step costs on any machine alike: tensor operations, and bytes that it saves for its backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts tensor operations by name, but for views, which compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = function._schema.returns
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        if not views and function._schema.name not in ("aten::_unsafe_view", "aten::detach"):
            self.names[function._schema.name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        """All together."""
        return self.names.total()


class Saved:
    """The storages that were saved, each once."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._tensors: dict[int, Tensor] = {}  # held, or another storage could get the same address

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor, unless it is one of the model's parameters."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self._parameters:
            self._tensors.setdefault(address, tensor)
        return tensor

    @property
    def bytes(self) -> int:
        """All together."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Saved]:
    """What forward passes within this context save for their backward passes, but for ``model``'s parameters."""
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved
