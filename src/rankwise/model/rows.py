"""Batches in which each row has its own adapter: ``model(x, adapter_names=["a", "b", "__base__"])``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters import AdapterLayer, ParameterSlot
from rankwise.adapters.saved import SavedModule
from rankwise.attach.attachment import adapter_layers, saved_modules
from rankwise.model.held import HoldsAdapters

BASE = "__base__"  # PEFT's name for a row without an adapter


class TakesRows(HoldsAdapters):
    """The part of an adapted model that takes ``adapter_names`` when it is called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return super().__call__(*args, **kwargs)
        with rows(self, names, (1,)):
            return super().__call__(*args, **kwargs)


class GeneratesByRow(HoldsAdapters):
    """The part of an adapted model that takes ``adapter_names`` in ``generate``."""

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call the model's own ``generate``. ``adapter_names`` names an adapter for each row of the input."""
        own: Any = super()
        if adapter_names is None:
            return own.generate(*args, **kwargs)
        settings = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        counts = [
            kwargs.get(name) or getattr(settings, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        ]
        with rows(self, adapter_names, (1, max(counts))):
            return own.generate(*args, **kwargs)


@contextmanager
def rows(model: HoldsAdapters, names: Sequence[str], repeats: Sequence[int]) -> Iterator[None]:
    """Return a context in which row i of each batch is computed with the adapter ``names[i]``.

    Args:
        model: the adapted model, in evaluation mode.
        names: name of an adapter for each row, or ``"__base__"`` for none.
        repeats: allowed numbers of batch rows per name, such as 1 and the number of beams.

    Raises:
        TypeError: ``names`` is not a list of names.
        ValueError: an adapter does not exist, or a layer cannot tell rows apart. While the model runs: a layer gets
            another number of rows than there are names.
    """
    _check(model, names)
    with ExitStack() as stack:
        for path, layer in adapter_layers(model).items():
            stack.enter_context(_forward(layer, _by_row(path, layer, names, repeats)))
        for path, module in saved_modules(model).items():
            stack.enter_context(_forward(module, _copies_by_row(path, module, names, repeats)))
        yield


def _check(model: HoldsAdapters, names: Sequence[str]) -> None:
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not all(isinstance(n, str) for n in names)
    ):
        raise TypeError(
            f"`adapter_names` must be a list with an adapter's name for each row, but is {names!r}."
        )
    for name in dict.fromkeys(names):
        if name != BASE:
            model._check_name(name)
    if model.training:
        raise ValueError(
            "`adapter_names` is for inference: call `model.eval()` first, or train one adapter at a time."
        )
    if model._merged():
        raise ValueError("`adapter_names` needs adapters that are not merged: call `unmerge_adapter` first.")
    for name in dict.fromkeys(names):
        if name != BASE and model.peft_config[name].bias != "none":
            raise ValueError(
                f"Adapter {name!r} has trained the base model's biases (bias={model.peft_config[name].bias!r}), which "
                "all rows share, so it can't act on some rows alone."
            )
    for path, layer in adapter_layers(model).items():
        routed = any("expert" in part for part in path.lower().split("."))  # rows get mixed
        if len(set(names)) > 1 and (routed or isinstance(layer, ParameterSlot)):
            raise ValueError(
                f"{path!r} computes tokens of all rows together, so `adapter_names` can't tell rows apart. Run the "
                "model once for each adapter, with `set_adapter`."
            )


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Return a context in which ``module`` computes ``forward``."""
    name = "_old_forward" if "_hf_hook" in vars(module) else "forward"  # Accelerate's hooks call the former
    before = vars(module).get(name)
    vars(module)[name] = forward
    try:
        yield
    finally:
        vars(module).pop(name)
        if before is not None:
            vars(module)[name] = before


def _by_row(
    path: str, layer: AdapterLayer, names: Sequence[str], repeats: Sequence[int]
) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = layer.base_forward(x, *args, **kwargs)
        if not layer.adapters_enabled:
            return output
        for name, places in _places(path, x, names, repeats).items():
            if name in layer.lora_A and layer.acts(name):
                added = layer.add_adapter_output(output[places], x[places], name)
                output = output.index_copy(0, places, added.to(output.dtype))
        return output

    return forward


def _copies_by_row(
    path: str, module: SavedModule, names: Sequence[str], repeats: Sequence[int]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not module.adapters_enabled or not any(name in module.modules_to_save for name in names):
            return module.run_with(None, args, kwargs)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or len(args) + len(kwargs) != 1:
            raise ValueError(
                f"{path!r} trains in full and takes more than one tensor, so `adapter_names` can't tell rows apart in "
                "it. Run the model once for each adapter, with `set_adapter`."
            )
        made: list[tuple[Tensor, Any]] = []
        for name, places in _places(path, x, names, repeats).items():
            part = x[places]
            inputs = ((part,), {}) if args else ((), {next(iter(kwargs)): part})
            made.append((places, module.run_with(name, *inputs)))
        if not all(isinstance(output, Tensor) for _, output in made):
            raise ValueError(
                f"{path!r} gives no single tensor, so `adapter_names` can't tell rows apart in it."
            )
        order = torch.cat([places for places, _ in made]).argsort()
        return torch.cat([output for _, output in made])[order]

    return forward


def _places(path: str, x: Tensor, names: Sequence[str], repeats: Sequence[int]) -> dict[str, Tensor]:
    """For each name, the indices of its rows in ``x``."""
    for times in dict.fromkeys(repeats):
        if x.dim() > 0 and len(x) == times * len(names):
            every = [name for name in names for _ in range(times)]
            return {
                name: torch.tensor([i for i, each in enumerate(every) if each == name], device=x.device)
                for name in dict.fromkeys(every)
            }
    if len(set(names)) == 1 and x.dim() > 0:
        return {names[0]: torch.arange(len(x), device=x.device)}
    raise ValueError(
        f"{path!r} gets {tuple(x.shape)}, which is not one row for each of the {len(names)} `adapter_names`: "
        "give as many names as rows. If the model itself mixes rows before this layer, run it once for each adapter, "
        "with `set_adapter`."
    )
