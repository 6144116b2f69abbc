"""The tensors of a run that must survive a checkpoint: the kept ranks, and the statistics of gradients.

On rankwise's own models they are buffers, so that the model's ``state_dict`` carries them through any trainer. On other
models, which stay unchanged, the run itself holds them.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("sensitivity", "uncertainty", "mask", "skipped")
BUFFERS = tuple(f"rankwise_{name}" for name in NAMES)
_AVERAGES = BUFFERS[:2]


def was_left_empty(name: str, own: Tensor, saved: Tensor) -> bool:
    """Whether ``saved`` is the buffer ``name`` of a run without statistics: such a buffer has at most one element."""
    return name in _AVERAGES and own.numel() != saved.numel() and saved.numel() <= 1


class RunTensors(ABC):
    """The tensors of one run, by the names in `NAMES`.

    - ``sensitivity`` and ``uncertainty``, (entries,), float32: the statistics of gradients.
    - ``mask``, (ranks,), bool: the ranks that the last cut kept.
    - ``skipped``, (), int64: the number of steps left out of the statistics.

    Args:
        device: a function that returns the device of the factors. Like ``FactorPair.device``, it must allow copying
            and pickling.
    """

    def __init__(self, device: Callable[[], torch.device]) -> None:
        self._device = device

    @property
    def model(self) -> nn.Module | None:
        """The model whose buffers the tensors are; None if the run holds them itself."""
        return None

    @property
    def are_gone(self) -> bool:
        """Whether the tensors were buffers of a model that does not exist any more."""
        return False

    def create(self, entries: int, ranks: int) -> None:
        """Make the tensors: all ranks kept, and ``entries`` zeros in each of the statistics."""
        device = self._device()
        values = (
            torch.zeros(entries, dtype=torch.float32, device=device),
            torch.zeros(entries, dtype=torch.float32, device=device),
            torch.ones(ranks, dtype=torch.bool, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )
        for name, value in zip(NAMES, values, strict=True):
            self._put(name, value)

    def get(self, name: str) -> Tensor:
        """The tensor with one of the `NAMES`, on the device of the factors. Statistics are in float32."""
        value = self._held(name)
        if value.is_floating_point() and value.dtype != torch.float32:  # model.half() also casts buffers
            value.data = value.data.float()
        device = self._device()
        if value.device != device and device.type != "meta":  # the model was moved
            value.data = value.data.to(device)
        return value

    @property
    def mask(self) -> Tensor:
        """The ranks that the last cut kept, (ranks,), bool, block by block."""
        return self.get("mask")

    @abstractmethod
    def _put(self, name: str, value: Tensor) -> None: ...

    @abstractmethod
    def _held(self, name: str) -> Tensor: ...

    @abstractmethod
    def remove(self) -> None:
        """Remove the tensors."""


class ModelBuffers(RunTensors):
    """Buffers of an adapted model.

    Args:
        model: the adapted model. It is referenced weakly, because it holds the run and must be freeable.
        device: a function that returns the device of the factors.
    """

    def __init__(self, model: nn.Module, device: Callable[[], torch.device]) -> None:
        super().__init__(device)
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model = weakref.ref(state["_model"])

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        model = self._model()
        if model is None:
            raise RuntimeError("The adapted model does not exist any more.")
        return model

    @property
    def are_gone(self) -> bool:
        return self._model() is None

    def _put(self, name: str, value: Tensor) -> None:
        self.model.register_buffer(f"rankwise_{name}", value)

    def _held(self, name: str) -> Tensor:
        held: Any = self.model._buffers[f"rankwise_{name}"]  # a compiled model looks for attributes elsewhere
        return held  # type: ignore[no-any-return]

    def remove(self) -> None:
        for name in BUFFERS:
            delattr(self.model, name)


class OwnTensors(RunTensors):
    """Tensors that the run holds itself."""

    def __init__(self, device: Callable[[], torch.device]) -> None:
        super().__init__(device)
        self._tensors: dict[str, Tensor] = {}

    def _put(self, name: str, value: Tensor) -> None:
        self._tensors[name] = value

    def _held(self, name: str) -> Tensor:
        return self._tensors[name]

    def remove(self) -> None:
        self._tensors.clear()

    def follow(self, device: Callable[[], torch.device]) -> None:
        """Ask ``device`` for the factors' device from now on, because the layer asked before may be gone."""
        self._device = device

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors on the CPU, by name."""
        return {name: self.get(name).detach().to("cpu", copy=True) for name in NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: the state belongs to a run on other layers.
        """
        for name in NAMES:
            own, saved = self.get(name), state.get(name)
            if saved is None or saved.shape != own.shape or saved.dtype != own.dtype:
                has = "no tensor" if saved is None else f"{saved.dtype} of shape {tuple(saved.shape)}"
                raise ValueError(
                    f"The state of the run has {has} as {name!r}, but this run needs {own.dtype} of shape "
                    f"{tuple(own.shape)}: it belongs to a run on other layers or ranks."
                )
        for name in NAMES:
            self.get(name).copy_(state[name])
