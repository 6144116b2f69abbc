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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from rankwise.adapters.branch import Kept, cast, gates_of, results_are_kept

if TYPE_CHECKING:
    from rankwise.adapters.layer import AdapterLayer


# A factor to compute with where autograd records nothing: B, or A with the gates folded in; and the gates of A's rows,
# (r, 1), in the dtype of the parameter. For triplets that don't act, A's rows and gates are 0. B's columns are 0, too,
# where E trains. All gradients are then 0 there without further work.
Ready = tuple[Tensor, Tensor | None]


class _Factor(NamedTuple):
    """A factor that a pass uses.

    Args:
        layer: the layer that holds it.
        adapter: the adapter's name.
        key: "lora_A" or "lora_B".
        dtype: the dtype in which the layer computes.
        gated: whether the adapter has gates.
    """

    layer: AdapterLayer
    adapter: str
    key: str
    dtype: torch.dtype
    gated: bool

    def parameter(self) -> Any:
        """The factor as it is now. None: the layer's adapters have been removed."""
        layer = self.layer
        return layer.factor(self.key, self.adapter) if hasattr(type(layer), "factor") else None


class _Group(NamedTuple):
    """Factors of one shape, device and dtype, which are cast to one dtype together.

    Args:
        shape: of each factor.
        device: of each factor.
        source: the dtype of each factor.
        dtype: the dtype in which they are needed.
        gated: whether their adapters have gates.
        factors: where each is.
        parameters: each factor.
        facts: what `_facts` returned for each.
    """

    shape: torch.Size
    device: torch.device
    source: torch.dtype
    dtype: torch.dtype
    gated: bool
    factors: list[_Factor]
    parameters: list[Tensor]
    facts: list[tuple[int, int]]

    def fits(self) -> bool:
        """Whether the parameters have the data that they had when the group was made.

        A parameter whose adapter has gates must still be its layer's, because the layer has the gates.
        """
        if list(map(_facts, self.parameters)) != self.facts:
            return False
        pairs = zip(self.factors, self.parameters, strict=True)
        return not self.gated or all(factor.parameter() is parameter for factor, parameter in pairs)


class _Groups(list[_Group]):
    """The factors that a model's last pass used.

    The model itself holds them, because they may lead to the model: a hook of a layer may hold it. From elsewhere they
    would keep it in memory. Copies and pickles of the model begin without them.
    """

    def __reduce__(self) -> Any:
        return list, ()


class _Pass:
    """The state of one forward pass of a model.

    Args:
        groups: the factors to prepare: those that the model's last pass used.
    """

    def __init__(self, groups: _Groups) -> None:
        if not all(group.fits() for group in groups):
            groups = _grouped(factor for group in groups for factor in group.factors)
        self._groups = groups
        made, gates = _prepared(groups)
        # By the parameter's id: the layer, the adapter, whether it has gates, where the data are, and the factor.
        self._made: dict[int, tuple[AdapterLayer, str, bool, int, Ready]] = {}
        for _, _, _, _, gated, factors, parameters, facts in groups:
            for (layer, adapter, *_), parameter, (pointer, _) in zip(factors, parameters, facts, strict=True):
                place = id(parameter)
                self._made[place] = layer, adapter, gated, pointer, (made[place], gates.get(place))
        self._used: set[int] = set()  # the ids of those prepared factors that were used
        self._others: dict[int, _Factor] = {}  # what the pass used besides
        self.cast: tuple[Any, ...] | None = None  # the last input that was cast: see `shared_cast`

    def find(
        self, layer: AdapterLayer, adapter: str, key: str, parameter: Tensor, gated: bool, dtype: torch.dtype
    ) -> Ready | None:
        """A prepared factor. None: the layer has to prepare it. Either way the next pass will prepare it."""
        place = id(parameter)
        made = self._made.get(place)
        if made is None or made[4][0].dtype != dtype or made[2] != gated:
            self._others[place] = _Factor(layer, adapter, key, dtype, gated)
            return None
        self._used.add(place)
        owner, name, _, pointer, factor = made
        # Layers and adapters that share a parameter have gates of their own. Hooks that offload a model exchange the
        # data in the middle of a pass.
        fits = owner is layer and name == adapter and pointer == parameter.data_ptr()
        return factor if fits else None

    def groups(self) -> _Groups:
        """The factors that the pass has used."""
        if not self._others and len(self._used) == len(self._made):
            return self._groups
        prepared = zip(self._made, (each for group in self._groups for each in group.factors), strict=True)
        used = [factor for place, factor in prepared if place in self._used and place not in self._others]
        return _grouped([*used, *self._others.values()])


_now = threading.local()  # .current: this thread's pass, or None
_LAST = "_rankwise_last_pass"  # the attribute in which a model holds its `_Groups`
_acting = WeakIdKeyDictionary()  # E -> the triplets that act, and the result of `_acts`


class OncePerPass:
    """Mixin of adapted models: a call of the model is a pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Compilers and tracers see all layers at once anyway. Selective checkpointing needs the same operations in both
        # passes, but the second would prepare what the first has used.
        if torch.compiler.is_compiling() or torch._C._is_tracing() or results_are_kept():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with _pass(self):  # type: ignore[arg-type]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _pass(model: nn.Module) -> Iterator[None]:
    held = vars(model)
    # A replica of nn.DataParallel holds the groups of the model, whose factors it does not use.
    used = None if "_is_replica" in held else held.get(_LAST)
    around, own = getattr(_now, "current", None), _Pass(used or _Groups())
    _now.current = own
    try:
        yield
        held[_LAST] = own.groups()
    finally:
        _now.current = around


def forget(model: nn.Module) -> None:
    """Let go of the factors that a model used, when it loses adapters."""
    vars(model).pop(_LAST, None)


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
    current: _Pass | None = getattr(_now, "current", None)
    if current is not None and not results_are_kept():
        found = current.find(layer, adapter, key, parameter, E is not None, dtype)
        if found is not None:
            return found
    if as_it_is:
        return parameter.detach().to(dtype), None
    factor = _Factor(layer, adapter, key, parameter.dtype, gated=True)
    kind = parameter.shape, parameter.device, parameter.dtype, parameter.dtype, True
    made, gates = _prepared([_Group(*kind, [factor], [parameter], [])])
    return cast(made[id(parameter)], dtype), gates.get(id(parameter))


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


def is_whole(parameter: Any) -> bool:
    """Whether a factor is an ordinary parameter that is here, not a share of one."""
    return type(parameter) is nn.Parameter and not (parameter.is_meta or "ds_id" in vars(parameter))


def _facts(parameter: Tensor) -> tuple[int, int]:
    """What changes if a parameter's data are exchanged: where its first number is, and how many it has."""
    return parameter.data_ptr(), parameter.numel()


def _grouped(factors: Iterable[_Factor]) -> _Groups:
    """Those factors that are here as a whole, in groups. A factor that several layers share is the first layer's."""
    groups: dict[Any, _Group] = {}
    seen = set()
    for factor in factors:
        parameter = factor.parameter()
        if is_whole(parameter) and id(parameter) not in seen:
            seen.add(id(parameter))
            kind = parameter.shape, parameter.device, parameter.dtype, factor.dtype, factor.gated
            group = groups.setdefault(kind, _Group(*kind, [], [], []))
            group.factors.append(factor)
            group.parameters.append(parameter)
            group.facts.append(_facts(parameter))
    return _Groups(groups.values())


@torch.no_grad()
def _prepared(groups: list[_Group]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Prepare factors in a few operations for each group. Returns them and every A's gates, by the parameters' ids."""
    made = {id(each): each for group in groups for each in group.parameters}
    gates = _fold_gates(made, groups)
    for shape, device, source, dtype, _, _, parameters, _ in groups:
        if source != dtype:
            copies = torch.empty(len(parameters), *shape, dtype=dtype, device=device).unbind()
            places = list(map(id, parameters))
            torch._foreach_copy_(copies, [made[place] for place in places])
            made.update(zip(places, copies, strict=True))
    return made, gates


def _fold_gates(made: dict[int, Tensor], groups: list[_Group]) -> dict[int, Tensor]:
    """Exchange every A for A with the gates folded in, and B for B with columns of 0. Returns every A's gates."""
    gates, acts, cut = {}, {}, {}
    gated = [group for group in groups if group.gated]
    factors = [factor for group in gated for factor in group.factors]
    places = [id(parameter) for group in gated for parameter in group.parameters]
    for place, (layer, adapter, key, _, _) in zip(places, factors, strict=True):
        E = layer.factor("lora_E", adapter)
        if E is None:
            continue
        kept = layer.kept.get(adapter)
        if key == "lora_A":
            gates[place] = E
            if kept is not None:
                acts[place] = _acts(kept, E)
        elif kept is not None and E.requires_grad:
            cut[place] = _acts(kept, E).T
    _multiply(gates, acts)
    _multiply(made, {**gates, **cut})
    return gates


def _multiply(values: dict[int, Tensor], by: dict[int, Tensor]) -> None:
    """Multiply those values for which ``by`` has a number, all in one operation."""
    if by:
        products = torch._foreach_mul([values[place] for place in by], list(by.values()))
        values.update(zip(by, products, strict=True))


def _acts(kept: Kept, E: Tensor) -> Tensor:
    """1 for triplets that act and 0 for others: (r, 1), with E's dtype and device. Made once for each ``kept``."""
    known = _acting.get(E)
    if known is None or known[0] is not kept or known[1].device != E.device or known[1].dtype != E.dtype:
        known = _acting[E] = kept, gates_of(E, None, kept)
    return known[1]  # type: ignore[no-any-return]
