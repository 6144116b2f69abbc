"""Adapters for parameters that belong to no layer of a known kind, such as the experts of a mixture of experts.

Transformers keeps all experts of a layer in parameters of three dimensions, which one module reads in its own
forward. A parameter (n, d1, d2) is a stack of n matrices, and its adapter has a block of ranks for each:

    A (n * r, d_in), B (d_out, n * r), E (n * r, 1): rows and columns i * r to (i + 1) * r belong to matrix i.

The matrices are (d_out, d_in), or (d_in, d_out) where the module says ``is_transposed``, as PEFT reads them. A
parameter of two dimensions is a stack of one.

The adapted object is a `ParameterSlot`. It stands for the parameter as a layer stands for its weight. The module that
owns the parameter keeps it, frozen, under its own name. While its forward runs, it reads the parameter as a
`SummedWeight`, which adds the adapter's update where the weight is multiplied.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.inplace import has_forward_of_its_own
from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.owner import SLOTS, add_slot, remove_slot
from rankwise.adapters.summed import SummedWeight
from rankwise.parallel.ddp import note_use


class ParameterSlot(nn.Module):
    """Stands for one parameter of a module, so that adapters can be added to it.

    Args:
        owner: the module that holds the parameter.
        name: the parameter's name in it.

    Raises:
        ValueError: the parameter is not a stack of matrices.

    Example:
        >>> owner = nn.Module()
        >>> owner.up_proj = nn.Parameter(torch.zeros(8, 6, 4))
        >>> ParameterSlot(owner, "up_proj").matrices
        8
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.parameter_name = name
        self._owner = weakref.ref(owner)
        weight = self.weight
        if weight.dim() not in (2, 3) or not weight.is_floating_point():
            raise ValueError(
                f"it is {weight.dtype} of shape {tuple(weight.shape)}, but only matrices and stacks of matrices can be "
                "adapted: floating-point parameters of 2 or 3 dimensions."
            )

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        owner = self._owner()
        if owner is None:
            raise RuntimeError(
                f"The module with the parameter {self.parameter_name!r} does not exist any more."
            )
        return owner

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return self.owner._parameters[self.parameter_name]  # type: ignore[return-value]

    @property
    def matrices(self) -> int:
        """The number of stacked matrices."""
        return self.weight.shape[0] if self.weight.dim() == 3 else 1

    @property
    def is_transposed(self) -> bool:
        """Whether the matrices are (d_in, d_out)."""
        return self.weight.dim() == 3 and bool(getattr(self.owner, "is_transposed", False))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = {**state, "_owner": weakref.ref(state["_owner"])}
        super().__setstate__(held)  # type: ignore[no-untyped-call]


def slot_of(owner: nn.Module, name: str) -> ParameterSlot:
    """The slot of a parameter. If the module has none, a new slot is returned, which is not attached yet.

    Raises:
        ValueError: the parameter is not a stack of matrices.
    """
    slots = owner._modules.get(SLOTS)
    held = None if slots is None else slots._modules.get(name)
    return held if isinstance(held, ParameterSlot) else ParameterSlot(owner, name)


class ParameterAdapters(AdapterLayer):
    """For a `ParameterSlot`."""

    called = "parameter"

    weight: Any
    owner: Any
    matrices: int
    is_transposed: bool
    parameter_name: str
    # Adapter -> its `kept`, and the result of `_stacked_places` for it.
    _places: dict[str, tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def adapts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, ParameterSlot)

    @classmethod
    def factor_shapes(cls, layer: Any, rank: int, adalora: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        d_out, d_in = layer.weight.shape[-2:]
        if layer.is_transposed:
            d_out, d_in = d_in, d_out
        return (layer.matrices * rank, d_in), (d_out, layer.matrices * rank)

    @classmethod
    def blocks(cls, layer: Any) -> int:
        return layer.matrices  # type: ignore[no-any-return]

    def prepare(self) -> None:
        owner: nn.Module = self.owner
        if has_forward_of_its_own(owner):
            raise ValueError(
                f"The `forward` of the {type(owner).__name__} that holds it has been replaced on the object itself, "
                "which would hide an adapter. Give the module a class of its own instead."
            )
        AdapterLayer.prepare(self)
        self._places = {}
        add_slot(owner, self.parameter_name, self)

    def clean(self) -> None:
        AdapterLayer.clean(self)
        del self._places
        remove_slot(self.owner, self.parameter_name)

    def held_weight(self) -> nn.Parameter | None:
        return self.weight  # type: ignore[no-any-return]

    # How it acts: the owner's forward reads the summed weight.

    def summed(self) -> SummedWeight | None:
        """The parameter with the updates that act on it, for one forward pass. None if no update acts."""
        sides = [self._sides(name) for name in self._acting()]
        if not sides:
            return None
        left, right = (torch.cat(each, dim) if len(sides) > 1 else each[0]
                       for each, dim in zip(zip(*sides, strict=True), (-1, -2), strict=True))  # fmt: skip
        return SummedWeight.make(self.weight, left, right)

    def idle_parameters(self) -> list[nn.Parameter]:
        """The factors of active adapters that have no triplet here."""
        idle = [name for name in self._active_unmerged() if name in self.lora_A and not self.acts(name)]
        return [parameter for name in idle for parameter in self._trained_here(name)]

    def _acting(self) -> list[str]:
        return [name for name in self._active_unmerged() if self.acts(name)]

    def _sides(self, name: str) -> tuple[Tensor, Tensor]:
        """Left (..., d1, k) and right (..., k, d2), whose product is the update of the parameter (..., d1, d2)."""
        A, B = self.stacked_factors(name)
        left, right = (A.mT, B.mT) if self.is_transposed else (B, A)
        return (left, right) if self.weight.dim() == 3 else (left[0], right[0])

    def stacked_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A (n, k, d_in) with E and the scale in it, and B (n, d_out, k).

        Here k is the largest rank of any of the n matrices: those with less have zeros.
        """
        if not torch.is_grad_enabled():
            note_use(self._trained_here(name))
        A, B, n = self.lora_A[name], self.lora_B[name], self.matrices
        E = self.lora_E[name] if name in self.lora_E else None
        if name not in self.kept:
            A, B = A.view(n, -1, A.shape[-1]), B.view(len(B), n, -1).transpose(0, 1)
            gate = None if E is None else E.view(n, -1, 1)
        else:
            places, there = self._stacked_places(name)
            A, B = A[places], B[:, places].transpose(0, 1)
            gate = there.to(A.dtype) if E is None else E[places] * there.to(A.dtype)
        return (A * self.scaling[name] if gate is None else A * (gate * self.scaling[name])), B

    def _stacked_places(self, name: str) -> tuple[Tensor, Tensor]:
        """The indices of the kept triplets, padded to (n, k), and a mask, (n, k, 1), that is False for the padding."""
        kept = self.kept[name]
        if isinstance(kept, int):  # one matrix, whose first triplets these are
            kept = self.kept[name] = torch.arange(kept, device="cpu")
        known = self._places.get(name)
        if known is None or known[0] is not kept or known[1].device != self.lora_A[name].device:
            rank = len(self.lora_A[name]) // self.matrices
            mask = torch.zeros(self.matrices * rank, dtype=torch.bool, device="cpu")
            mask[kept.cpu()] = True
            mask = mask.view(self.matrices, rank)
            front = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[
                :, : int(mask.sum(1).max())
            ]
            places = front + torch.arange(self.matrices, device="cpu")[:, None] * rank
            device = self.lora_A[name].device
            known = self._places[name] = (
                kept, places.to(device), mask.gather(1, front)[..., None].to(device),
            )  # fmt: skip
        return known[1], known[2]

    def delta_weight(self, name: str) -> Tensor:
        left, right = self._sides(name)
        return left @ right

    # The file's layout. Plain LoRA's B is laid out by rank first and matrix second, as in PEFT.

    def to_file(self, factor: str, tensor: Tensor, adalora: bool) -> Tensor:
        if factor != "B" or adalora:
            return tensor
        return tensor.view(len(tensor), self.matrices, -1).transpose(1, 2).flatten(1)

    @classmethod
    def from_file(cls, layer: Any, factor: str, tensor: Tensor, adalora: bool) -> Tensor:
        if factor != "B" or adalora or tensor.dim() != 2 or tensor.shape[1] % layer.matrices:
            return tensor
        return stacked_columns(tensor, layer.matrices)


def stacked_columns(B: Tensor, matrices: int) -> Tensor:
    """B (d_out, r * n) as plain LoRA's files have it, with rank for rank, as (d_out, n * r), matrix for matrix."""
    return B.reshape(len(B), -1, matrices).transpose(1, 2).flatten(1)
