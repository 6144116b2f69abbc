"""Estimating the memory of a training step's forward and backward pass, without computing anything.

The step runs on PyTorch's fake tensors, which have shapes, dtypes and strides but no values. Every tensor that an
operation makes is counted until it is freed. This works for any model that PyTorch can run. The peak includes tensors
that autograd saves, intermediate gradients, float32 logits, and activations that checkpointing computes a second time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankwise.attach.prepare import enable_checkpointing


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of tensors that operations make in it, until the tensors are freed.

    Args:
        known: existing tensors, which are not counted.

    Attributes:
        now: the bytes at present.
        peak: the most bytes so far.

    Example:
        >>> with LiveBytes() as live:
        ...     kept = torch.zeros(10) + torch.ones(10)
        >>> live.now, live.peak
        (40, 120)
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._watch(tensor, 0)

    def _watch(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:  # the tensor is a view, or was changed in place
            return
        counted = storage.nbytes() if size is None else size
        self._storages[key] = weakref.ref(storage, lambda _: self._forget(key, counted))
        self.now += counted
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._storages[key]
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return output


class FakeRun:
    """A model on fake tensors, which runs without computing anything.

    Args:
        model: an adapted Transformers model on the meta device. It can't be used for anything else afterwards.
        autocast: the dtype of mixed precision. None: no mixed precision.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None = None) -> None:
        self.model, self.autocast = model, autocast
        self._fake = FakeTensorMode()
        self._known = _without_numbers(model, self._fake)

    def training_peak(
        self, batch: Mapping[str, Tensor], *, checkpointing: bool = False, accumulates: bool = False
    ) -> int:
        """The peak of activations and gradients together in a training step, in bytes.

        Args:
            batch: the arguments of the model's forward, labels included. Only shapes and dtypes matter.
            checkpointing: whether to use gradient checkpointing.
            accumulates: whether gradients of an earlier batch already exist.
        """
        self.model.train()
        if checkpointing:
            enable_checkpointing(self.model, {"use_reentrant": False})
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with self._fake, _GroupedProducts(), LiveBytes(self._known) as live:
            if accumulates:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
            self._loss(batch).backward()
            for parameter in trained:
                parameter.grad = None
        peak: int = live.peak
        return peak

    def evaluation_peak(self, batch: Mapping[str, Tensor]) -> int:
        """The peak of a forward pass in evaluation, in bytes. It includes caches of keys and values."""
        self.model.eval()
        with self._fake, _GroupedProducts(), torch.no_grad(), LiveBytes(self._known) as live:
            self._loss(batch)
        peak: int = live.peak
        return peak

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        # The other outputs are freed before the backward pass, as in Trainer.
        inputs = {name: torch.empty(each.shape, dtype=each.dtype) for name, each in batch.items()}
        if self.autocast is None:
            loss: Tensor = self.model(**inputs).loss
            return loss
        from accelerate.utils import convert_outputs_to_fp32

        with torch.autocast("cpu", dtype=self.autocast):
            loss = convert_outputs_to_fp32(self.model.forward)(**inputs).loss  # as Accelerate does
        return loss


class _GroupedProducts(TorchDispatchMode):
    """Gives grouped matrix products of fake tensors their shapes. PyTorch's own rule accepts only bfloat16."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        grouped = getattr(torch.ops.aten, "_grouped_mm", None)  # PyTorch 2.6 has none
        if grouped is None or func is not grouped.default:
            return func(*args, **(kwargs or {}))
        a, b = args[:2]
        offsets: Any = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
        groups = () if a.dim() + b.dim() == 5 else (offsets.shape[0] if a.dim() == 2 else a.shape[0],)
        return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def _without_numbers(model: nn.Module, fake: FakeTensorMode) -> list[Tensor]:
    """Replace a meta model's parameters and buffers by fake tensors on the CPU. Tied parameters stay tied."""
    made: dict[int, Tensor] = {}

    def replaced(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with fake:
                like = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
            trains = tensor.requires_grad
            made[id(tensor)] = nn.Parameter(like, trains) if isinstance(tensor, nn.Parameter) else like
        return made[id(tensor)]

    before = []  # keeps the replaced tensors alive, so that no id is used twice
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    before.append(tensor)
                    held[name] = replaced(tensor)  # type: ignore[assignment]
    return list(made.values())
