"""Makes factors ready for computing, once in each forward pass of the whole model.

The factors are float32 parameters, and the layers may compute in bfloat16. The paper's form of AdaLoRA uses A with its
gates folded in. If each layer prepared its own factors, that would take up to six small operations for each layer. Here
a handful of operations prepares the factors of all layers: a pass records which factors its layers use, and when the
next pass begins, these are prepared together.

Prepared factors are dropped at the end of the pass. They can't be kept until the parameters change, because nothing
tells when that happens: fused and 8-bit optimizers, DeepSpeed and ``.data`` change parameters without raising their
version counters. A layer prepares its own factors outside of a pass (a part of the model is called, a checkpoint
computes again), and if they are sharded when the pass begins.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from rankwise.adapters.branch import Kept, gates_of, results_are_kept

if TYPE_CHECKING:
    from rankwise.adapters.layer import AdapterLayer


# A factor to compute with where autograd records nothing: B, or A with the gates folded in; and the gates of A's rows,
# (r, 1), in the dtype of the parameter. For triplets that don't act, A's rows and gates are 0. B's columns are 0, too,
# where E trains. All gradients are then 0 there without further work.
Ready = tuple[Tensor, Tensor | None]

# The use of a factor: the layer's id, the adapter, "lora_A" or "lora_B", the dtype, and whether the adapter has gates.
Use = tuple[int, str, str, torch.dtype, bool]
Uses = dict[Use, "AdapterLayer"]


class _Pass:
    """The state of one forward pass of a model.

    Args:
        uses: the factors to prepare: those that the model's last pass used.
    """

    def __init__(self, uses: Uses) -> None:
        whole: dict[Use, Tensor] = {}
        for use, layer in uses.items():
            _, adapter, key, *_ = use
            # The layer's adapters may have been removed since.
            parameter = layer.factor(key, adapter) if hasattr(type(layer), "factor") else None
            if type(parameter) is nn.Parameter and not (parameter.is_meta or hasattr(parameter, "ds_id")):
                whole[use] = parameter
        made, gates = _prepared(whole, uses)
        # With the places of the numbers: hooks that offload a model exchange them in the middle of a pass.
        self.made = {use: (each, each.data_ptr(), (made[use], gates.get(use))) for use, each in whole.items()}
        self.used: Uses = {}
        self.cast: tuple[Any, ...] | None = None  # the last input that was cast: see `shared_cast`


_now = threading.local()  # .current: this thread's pass, or None
_last: WeakKeyDictionary[nn.Module, Uses] = WeakKeyDictionary()  # the uses in a model's last pass
_acting = WeakIdKeyDictionary()  # E -> the triplets that act, and the result of `_acts`


class OncePerPass:
    """Mixin of adapted models: a call of the model is a pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._is_tracing():  # they see all layers at once anyway
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with _pass(self):  # type: ignore[arg-type]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _pass(model: nn.Module) -> Iterator[None]:
    around, own = getattr(_now, "current", None), _Pass(_last.get(model, {}))
    _now.current = own
    try:
        yield
        _last[model] = own.used
    finally:
        _now.current = around


def ready(
    layer: AdapterLayer, adapter: str, key: str, parameter: Tensor, E: Tensor | None, dtype: torch.dtype
) -> Ready:
    """A factor in ``dtype``, ready to compute with where autograd records nothing.

    Args:
        layer: the layer that holds the factor.
        adapter: the adapter's name.
        key: "lora_A" or "lora_B".
        parameter: the factor: ``layer.factor(key, adapter)``.
        E: the adapter's gates: ``layer.factor("lora_E", adapter)``.
        dtype: the dtype in which the layer computes.
    """
    as_it_is = E is None or key == "lora_B" and not (E.requires_grad and adapter in layer.kept)
    if as_it_is and parameter.dtype == dtype:
        return parameter, None
    use = (id(layer), adapter, key, dtype, E is not None)
    current: _Pass | None = getattr(_now, "current", None)
    if current is not None and not results_are_kept():
        current.used[use] = layer
        found = current.made.get(use)
        if found is not None and found[0] is parameter and found[1] == parameter.data_ptr():
            return found[2]
    made, gates = _prepared({use: parameter}, {use: layer})
    return made[use], gates.get(use)


def shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, the same tensor for layers that follow each other with the same input, as q, k and v do.

    A change of x that autograd does not count (through ``.data``) is not seen.
    """
    current: _Pass | None = getattr(_now, "current", None)
    # A tensor of inference mode does not count its changes.
    if current is None or x.is_inference() or results_are_kept():
        return x.to(dtype)
    key = (x._version, torch.is_grad_enabled(), x.requires_grad, x.is_leaf, dtype)
    last = current.cast
    if last is not None and last[0]() is x and last[1] == key:
        return last[2]  # type: ignore[no-any-return]
    made = x.to(dtype)
    current.cast = weakref.ref(x), key, made
    return made


@torch.no_grad()
def _prepared(factors: dict[Use, Tensor], layers: Uses) -> tuple[dict[Use, Tensor], dict[Use, Tensor]]:
    """Prepare factors, all together in a few operations. Returns them, and the gates of every A that has gates."""
    made = dict(factors)
    gates = _fold_gates(made, layers)
    alike: dict[Any, list[Use]] = {}
    for use, factor in made.items():
        if factor.dtype != use[3]:
            alike.setdefault((factor.shape, factor.device, factor.dtype, use[3]), []).append(use)
    for (shape, device, _, dtype), uses in alike.items():
        copies = torch.empty(len(uses), *shape, dtype=dtype, device=device).unbind()
        torch._foreach_copy_(copies, [made[use] for use in uses])
        made.update(zip(uses, copies, strict=True))
    return made, gates


def _fold_gates(factors: dict[Use, Tensor], layers: Uses) -> dict[Use, Tensor]:
    """Exchange every A for A with the gates folded in, and B for B with columns of 0. Returns every A's gates."""
    gates, acts, cut = {}, {}, {}
    for use in factors:
        _, adapter, key, _, gated = use
        layer = layers[use]
        E = layer.factor("lora_E", adapter) if gated else None
        if E is None:
            continue
        kept = layer.kept.get(adapter)
        if key == "lora_A":
            gates[use] = E
            if kept is not None:
                acts[use] = _acts(kept, E)
        elif kept is not None and E.requires_grad:
            cut[use] = _acts(kept, E).T
    _multiply(gates, acts)
    _multiply(factors, {**gates, **cut})
    return gates


def _multiply(values: dict[Use, Tensor], by: Mapping[Use, Tensor]) -> None:
    """Multiply those values for which ``by`` has a number, all in one operation."""
    if by:
        products = torch._foreach_mul([values[use] for use in by], list(by.values()))
        values.update(zip(by, products, strict=True))


def _acts(kept: Kept, E: Tensor) -> Tensor:
    """1 for triplets that act and 0 for others: (r, 1), with E's dtype and device. Made once for each ``kept``."""
    known = _acting.get(E)
    if known is None or known[0] is not kept or known[1].device != E.device or known[1].dtype != E.dtype:
        known = _acting[E] = kept, gates_of(E, None, kept)
    return known[1]  # type: ignore[no-any-return]
