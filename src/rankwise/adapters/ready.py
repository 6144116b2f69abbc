"""Makes factors ready for computing, once in each forward pass of the whole model.

The factors are float32 parameters, and the layers may compute in bfloat16. The paper's form of AdaLoRA uses A with its
gates folded in. If each layer prepared its own factors, that would take two to six small operations for each layer.
Here a handful of operations prepares the factors of all layers. A pass records which factors its layers use; when the
next pass begins, these are prepared together.

Prepared factors are dropped at the end of the pass. They can't be kept until the parameters change, because nothing
tells when that happens: fused and 8-bit optimizers, DeepSpeed and ``.data`` change parameters without raising their
version counters. A layer prepares its own factors outside of a pass (a part of the model is called, a checkpoint
computes again), and if they are sharded when the pass begins.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from rankwise.adapters.branch import Kept, gates_of, results_are_kept
from rankwise.parallel.sharded import is_sharded

if TYPE_CHECKING:
    from rankwise.adapters.layer import AdapterLayer


# One use of a factor: the layer's id, the adapter, the factor ("A" or "B", or the key of one without gates), the dtype.
Use = tuple[int, str, str, torch.dtype]


class Ready(NamedTuple):
    """A factor to compute with. It is outside the graph.

    For triplets that don't act, A's rows and gates are 0. B's columns are 0, too, where E trains. All gradients are
    then 0 there without further work.
    """

    factor: Tensor  # A with the gates folded in, or B
    gates: Tensor | None  # the gates of A's rows, (r, 1), in the dtype of the parameter; None for B


Uses = dict[Use, "AdapterLayer"]

# The state of this thread's pass. For factors with gates: .made (prepared ones) and .asked (uses). For all others:
# .casts and .asked_casts. For inputs: .cast, the last one that was cast.
_now = threading.local()
# .asked and .asked_casts of a model.
_last: WeakKeyDictionary[nn.Module, tuple[Uses, Uses]] = WeakKeyDictionary()
_acting = WeakIdKeyDictionary()  # indices of triplets -> the result of `_where`


class OncePerPass:
    """Mixin of adapted models: a call of the model is a pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler sees all layers at once anyway
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with _pass(self):  # type: ignore[arg-type]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _pass(model: nn.Module) -> Iterator[None]:
    around = vars(_now).copy()
    gated, plain = _last.get(model, ({}, {}))
    here = {use: layer for use, layer in gated.items() if _is_here(layer, use[1])}
    places = {use: _place(layer.factor("lora_" + use[2], use[1])) for use, layer in here.items()}
    _now.made = {use: (places[use], found) for use, found in _made(here).items()}
    _now.casts, _now.asked, _now.asked_casts, _now.cast = _cast(plain), {}, {}, None
    try:
        yield
        _last[model] = (_now.asked, _now.asked_casts)
    finally:
        vars(_now).clear()
        vars(_now).update(around)


def ready(layer: AdapterLayer, adapter: str, factor: str, dtype: torch.dtype) -> Ready:
    """Factor "A" or "B" of an adapter in ``dtype``, ready to compute with."""
    parameter = layer.factor("lora_" + factor, adapter)
    if layer.factor("lora_E", adapter) is None:
        return Ready(ready_cast(layer, adapter, "lora_" + factor, parameter, dtype), None)
    use = (id(layer), adapter, factor, dtype)
    now = vars(_now)
    in_pass = "asked" in now and not results_are_kept()
    place, found = now["made"].get(use, (None, None)) if in_pass else (None, None)
    if found is None or place != _place(parameter):
        if parameter.dtype == dtype and _is_as_it_is(layer, adapter, factor):
            return Ready(parameter.detach(), None)
        found = _made({use: layer})[use]
    if in_pass:
        now["made"][use], now["asked"][use] = (_place(parameter), found), layer
    return found


def ready_cast(layer: AdapterLayer, adapter: str, key: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """``parameter``, which is factor ``key`` of an adapter without gates, in ``dtype`` and outside the graph."""
    if parameter.dtype == dtype:
        return parameter.detach()
    now = vars(_now)
    if "asked_casts" in now and not results_are_kept():
        now["asked_casts"][id(layer), adapter, key, dtype] = layer
        found = now["casts"].get((id(parameter), dtype))
        if found is not None and found[0] is parameter and found[1] == parameter.data_ptr():
            return found[2]  # type: ignore[no-any-return]
    return parameter.detach().to(dtype)


@torch.no_grad()
def _cast(uses: Uses) -> dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]]:
    """The factors that are here, each with its place and its cast to the dtype that was asked for.

    They are found by the factor's id and the dtype.
    """
    alike: dict[Any, list[Tensor]] = {}
    for (_, adapter, key, dtype), layer in uses.items():
        parameter = layer.factor(key, adapter) if _is_adapted(layer) else None
        if type(parameter) is nn.Parameter and not (parameter.is_meta or hasattr(parameter, "ds_id")):
            alike.setdefault((parameter.shape, parameter.device, parameter.dtype, dtype), []).append(
                parameter
            )
    made = {}
    for (_, _, _, dtype), parameters in alike.items():
        for parameter, copy in zip(parameters, torch.stack(parameters).to(dtype).unbind(), strict=True):
            made[id(parameter), dtype] = (parameter, parameter.data_ptr(), copy)
    return made


def shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, the same tensor for layers that follow each other with the same input, as q, k and v do.

    A change of x that autograd does not count (through ``.data``) is not seen.
    """
    now = vars(_now)
    # A tensor of inference mode does not count its changes.
    if "asked" not in now or x.is_inference() or results_are_kept():
        return x.to(dtype)
    key = (x._version, torch.is_grad_enabled(), x.requires_grad, x.is_leaf, dtype)
    last = now["cast"]
    if last is not None and last[0]() is x and last[1] == key:
        return last[2]  # type: ignore[no-any-return]
    made = x.to(dtype)
    now["cast"] = weakref.ref(x), key, made
    return made


def _is_as_it_is(layer: AdapterLayer, adapter: str, factor: str) -> bool:
    """Whether a factor of an adapter with gates needs no preparation except a cast."""
    return factor == "B" and not _cuts_B(layer.kept.get(adapter), layer.factor("lora_E", adapter))


def _cuts_B(kept: Kept, E: Tensor) -> bool:
    """Whether columns of B are set to 0: see `Ready`."""
    return kept is not None and E.requires_grad


def _place(parameter: Tensor) -> int | None:
    """Where a parameter's numbers are. Hooks that offload a model give it others in the middle of a pass."""
    return parameter.data_ptr() if type(parameter) is nn.Parameter else None


def _is_adapted(layer: nn.Module) -> bool:
    """Whether a layer that the last pass used still has adapters: they may have been removed since."""
    return hasattr(type(layer), "factor")


def _is_here(layer: AdapterLayer, adapter: str) -> bool:
    if not _is_adapted(layer) or not layer.acts(adapter):
        return False
    A = layer.factor("lora_A", adapter)
    return not (A.is_meta or is_sharded(A)) and layer.factor("lora_E", adapter) is not None


class _Asked:
    """A factor that is being prepared. The result is a `Ready`."""

    def __init__(self, layer: AdapterLayer, adapter: str, factor: str, dtype: torch.dtype) -> None:
        self.parameter: Tensor = layer.factor("lora_" + factor, adapter)
        self.E: Tensor = layer.factor("lora_E", adapter)
        self.kept = layer.kept.get(adapter)
        self.dtype = dtype
        self.is_A = factor == "A"
        self.cut_B = not self.is_A and _cuts_B(self.kept, self.E)
        self.factor = self.parameter
        self.gates: Tensor | None = None


@torch.no_grad()
def _made(uses: Mapping[Use, AdapterLayer]) -> dict[Use, Ready]:
    """Prepare factors with gates, all together in a few operations."""
    every = [_Asked(layer, *use[1:]) for use, layer in uses.items()]
    _set_gates([each for each in every if each.is_A])
    _cut([each for each in every if each.cut_B])
    gated = [(each, each.gates) for each in every if each.gates is not None]
    if gated:
        folded = torch._foreach_mul([each.factor for each, _ in gated], [gates for _, gates in gated])
        for (each, _), factor in zip(gated, folded, strict=True):
            each.factor = factor
    cast = [each for each in every if each.factor.dtype != each.dtype]
    for each, copy in zip(cast, _copies([(e.factor, e.factor.shape, e.dtype) for e in cast]), strict=True):
        each.factor = copy
    for each in every:
        if each.factor is each.parameter:
            each.factor = each.parameter.detach()
    return {use: Ready(each.factor, each.gates) for use, each in zip(uses, every, strict=True)}


def _set_gates(every: Sequence[_Asked]) -> None:
    """Find the gates by which the rows of every A are multiplied."""
    first, some = [], []
    for each in every:
        if isinstance(each.kept, Tensor):
            some.append((each, each.E, _where(each.kept, each.parameter)))
        # The optimizer's momentum moves gates that were closed.
        elif each.kept is not None and each.E.requires_grad:
            first.append((each, each.E, each.kept))
        else:
            each.gates = each.E
    copies = _copies([(E[:kept], E.shape, E.dtype) for _, E, kept in first])
    for (each, _, _), copy in zip(first, copies, strict=True):
        each.gates = copy
    if some:
        gates = torch._foreach_mul([E for _, E, _ in some], [acts for _, _, acts in some])
        for (each, _, _), gate in zip(some, gates, strict=True):
            each.gates = gate


def _cut(every: Sequence[_Asked]) -> None:
    """Set the columns of every B to 0 that don't act."""
    first = [(each, each.parameter, each.kept) for each in every if isinstance(each.kept, int)]
    copies = _copies([(B[:, :kept], B.shape, each.dtype) for each, B, kept in first])
    for (each, _, _), copy in zip(first, copies, strict=True):
        each.factor = copy
    for each in every:
        if isinstance(each.kept, Tensor):
            each.factor = each.parameter * _where(each.kept, each.parameter.T).T


def _where(kept: Tensor, A: Tensor) -> Tensor:
    """1 for triplets that act and 0 for others: (r, 1), with A's dtype and device. Made once for each ``kept``."""
    known = _acting.get(kept)
    if known is None or known.device != A.device or known.dtype != A.dtype:
        known = _acting[kept] = gates_of(A, None, kept)
    return known  # type: ignore[no-any-return]


def _copies(wanted: Sequence[tuple[Tensor, torch.Size, torch.dtype]]) -> list[Tensor]:
    """Copies of matrices, each padded with zeros on the right and below to a shape, in a dtype."""
    made: dict[int, Tensor] = {}
    groups: dict[Any, list[int]] = {}
    for place, (source, _, dtype) in enumerate(wanted):
        groups.setdefault((source.device, dtype), []).append(place)
    for (device, dtype), places in groups.items():
        shapes = [wanted[place][1] for place in places]
        sources = [wanted[place][0] for place in places]
        if all(source.shape == shape for source, shape in zip(sources, shapes, strict=True)):
            together = torch.cat([source.reshape(-1) for source in sources]).to(dtype)
            copies = _parts(together, shapes)
        else:
            copies = _parts(torch.zeros(sum(map(math.prod, shapes)), dtype=dtype, device=device), shapes)
            corners = [copy[: len(own), : own.shape[1]] for copy, own in zip(copies, sources, strict=True)]
            torch._foreach_copy_(corners, sources)
        made |= zip(places, copies, strict=True)
    return [made[place] for place in range(len(wanted))]


def _parts(together: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Split a vector into matrices of the given shapes, as views."""
    pieces = together.split(list(map(math.prod, shapes)))
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
