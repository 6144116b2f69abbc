"""EVA's start: A begins with the directions in which a layer's input varies most (Paischer et al., 2024)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.linear import LinearAdapters
from rankwise.attach import adapter_layers
from rankwise.distributed import is_sharded, many_processes

_PASSES = 3  # over the batches: each brings the directions nearer to the exact ones


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any],
    forward_fn: Callable[[Any, Any], Any] | None = None,
    adapter_name: str = "default",
    batches: int = 8,
) -> Any:
    """Let an adapter start from data, in place, and return the model.

    The rows of every linear layer's A, (r, d_in), become the first r principal components of its inputs (orthonormal,
    the strongest first), which are found by orthogonal iteration over some batches. B is 0, so the model still is its
    base; only the directions in which it learns first are better than random ones. Adapters of embeddings and
    convolutions, and layers that no batch reaches, keep the start that they have.

    Call it after `get_peft_model` and before training; in many processes, in all of them and before the model is
    wrapped or sharded: each looks at its own batches, and all get the same start.

    Args:
        model: has an untrained `LoraConfig` or (gated) `AdaLoraConfig` adapter.
        dataloader: batches of training data, such as the DataLoader that training will use.
        forward_fn: runs the model on a batch, as ``forward_fn(model, batch)``. Left out, a batch is passed as keyword
            arguments if it is a mapping, as positional ones if it is a tuple or a list, else as the one argument.
        adapter_name: which adapter starts so.
        batches: how many of the batches are looked at, at least 1. They are kept in memory meanwhile.

    Raises:
        TypeError: ``model`` is not a module, ``dataloader`` not iterable, or ``batches`` not a whole number.
        ValueError: there is no such adapter, it has been trained or is the paper's form of AdaLoRA, the model is
            sharded, there is no batch, or a layer's input holds NaN or infinite values.

    Example:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4))
        >>> model = rw.get_peft_model(model, rw.LoraConfig(r=1, target_modules=["0"]))
        >>> data = [torch.tensor([[0.0, 2.0, 0.0], [0.0, -2.0, 0.1]])]  # varies along the second axis
        >>> model = rw.initialize_lora_eva_weights(model, data)
        >>> model[0].lora_A["default"].abs().round(decimals=1)
        tensor([[0., 1., 0.]], grad_fn=<...>)
    """
    layers = _layers(model, adapter_name)
    if isinstance(batches, bool) or not isinstance(batches, int):
        raise TypeError(f"`batches` must be a whole number, but is {batches!r}.")
    if batches < 1:
        raise ValueError(f"`batches` must be at least 1, but is {batches}.")
    if not isinstance(dataloader, Iterable):
        raise TypeError(f"`dataloader` must give batches, but is {type(dataloader).__name__}.")
    looked_at = list(itertools.islice(dataloader, batches))
    if not looked_at:
        raise ValueError("`dataloader` gave no batch; a start from data needs at least one.")
    device = next(model.parameters()).device
    looked_at = [_moved(batch, device) for batch in looked_at]
    found = {path: _Components(layer.lora_A[adapter_name]) for path, layer in layers.items()}
    with torch.no_grad(), _evaluating(model):
        for _ in range(_PASSES):
            for batch in looked_at:
                with _watching(layers, found, _mask(batch)):
                    (forward_fn or _forward)(model, batch)
            for path, components in found.items():
                components.improve(path)
        if not any(components.seen for components in found.values()):
            raise ValueError(
                f"No batch reached a linear layer of adapter {adapter_name!r}. Call this before `torch.compile`, "
                "and let `forward_fn` run the model that holds the adapter."
            )
        for path, layer in layers.items():
            if found[path].seen:
                rows = found[path].directions.T
                layer.lora_A[adapter_name][: len(rows)].copy_(rows)
    return model


def _layers(model: Any, adapter: str) -> dict[str, LinearAdapters]:
    """The linear layers of an adapter that can start anew."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, but is a {type(model).__name__}.")
    every = adapter_layers(model, adapter)
    if not every:
        raise ValueError(
            f"The model has no adapter {adapter!r}: call `get_peft_model` first, or give `adapter_name`."
        )
    found = {path: layer for path, layer in every.items() if isinstance(layer, LinearAdapters)}
    if not found:
        raise ValueError(f"Adapter {adapter!r} has no linear layer, and no other can start from data.")
    for path, layer in found.items():
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        if is_sharded(A) or A.dim() != 2 or A.shape[1] != layer.adapter_widths(lora_groups=False)[0]:
            raise ValueError(
                "The adapter is sharded: give it its start before the model is sharded or wrapped."
            )
        if B.any():
            raise ValueError(
                f"Adapter {adapter!r} has been trained, or is the paper's form of AdaLoRA, whose start is another: "
                f"{path!r} has a B that is not 0. Only an untrained LoRA or gated AdaLoRA adapter can start from data."
            )
    return found


class _Components:
    """Orthogonal iteration for the principal components of a layer's inputs, (d_in, rank), no more than d_in."""

    def __init__(self, A: Tensor) -> None:
        start = A.detach()[: A.shape[1]].float().T.contiguous()
        _from_the_first_process(start)
        self.directions, _ = torch.linalg.qr(start)
        self.seen = False
        self._forget()

    def _forget(self) -> None:
        self.product = torch.zeros_like(self.directions)
        # Sum of the inputs, and below it how many they are.
        self.sums = torch.zeros(len(self.directions) + 1, 1, device=self.directions.device)

    def add(self, inputs: Tensor) -> None:
        """Add inputs, (n, d_in), to ``X^T X directions``."""
        inputs = inputs.to(self.directions)
        self.product += inputs.T @ (inputs @ self.directions)
        self.sums[:-1, 0] += inputs.sum(0)
        self.sums[-1] += len(inputs)

    def improve(self, path: str) -> None:
        """Bring the directions nearer to the components, and in order."""
        for part in (self.product, self.sums):
            _sum_over_processes(part)
        if not self.product.isfinite().all():
            raise ValueError(
                f"The input of {path!r} holds NaN or infinite values: see to the batches and the model."
            )
        self.seen = bool(self.sums[-1] > 0)
        if self.seen:
            mean = self.sums[:-1] / self.sums[-1]
            covered = self.product - self.sums[:-1] @ (mean.T @ self.directions)
            _, turned = torch.linalg.eigh(self.directions.T @ covered)
            self.directions, _ = torch.linalg.qr(covered @ turned.flip(1))
        self._forget()


@contextlib.contextmanager
def _watching(
    layers: Mapping[str, nn.Module], found: Mapping[str, _Components], mask: Tensor | None
) -> Iterator[None]:
    """Show the layers' inputs to the components, but for positions that the mask leaves out."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs = arguments[0]
            if mask is not None and inputs.shape[:-1] == mask.shape:
                inputs = inputs[mask.to(inputs.device, torch.bool)]
            found[path].add(inputs.flatten(0, -2))

        return see

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; each module goes on as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _mask(batch: Any) -> Tensor | None:
    """The positions, (batch, length), that are no padding, where the batch says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def _forward(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_moved(value, device) for value in batch]
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _from_the_first_process(tensor: Tensor) -> None:
    if many_processes():
        torch.distributed.broadcast(tensor, 0)


def _sum_over_processes(tensor: Tensor) -> None:
    if many_processes():
        torch.distributed.all_reduce(tensor)
