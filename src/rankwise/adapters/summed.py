"""A frozen weight plus a low-rank update that is added where the weight is multiplied, and never formed.

Models that hold weights as parameters read them inside a forward of their own: one expert at a time
(``linear(x, weight[i])``), gathered for every token (``bmm(weight[ids], x)``), or grouped (``grouped_mm(x, weight)``).
A `SummedWeight` stands in for such a parameter. The forward sees a tensor, and each of these products becomes

    x @ (W + L R) = x @ W + (x @ L) @ R

through PyTorch's ``__torch_function__``, whatever the model's forward looks like around it. All other operations
work on the formed sum, and a message names them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

_ALIGNMENT = 16  # bytes: grouped products need rows whose size is a multiple of this

_NOTHING = torch.empty(0)


class SummedWeight(Tensor):
    """``base + left @ right``: base (..., n, m), left (..., n, k), right (..., k, m).

    It has the base weight's shape, dtype and device; operations see the sum.

    Example:
        >>> base, left, right = torch.zeros(2, 3, 4), torch.ones(2, 3, 1), torch.ones(2, 1, 4)
        >>> weight = SummedWeight.make(base, left, right)
        >>> F.linear(torch.ones(5, 4), weight[0])[0], weight.shape
        (tensor([4., 4., 4.]), torch.Size([2, 3, 4]))
    """

    base: Tensor
    left: Tensor
    right: Tensor
    _pieces: tuple[SummedWeight, ...] | None

    @staticmethod
    def make(base: Tensor, left: Tensor, right: Tensor) -> SummedWeight:
        """The sum of ``base`` and ``left @ right``. All three have 2 dimensions, or all have 3."""
        # It owns no data. The base weight may be of a type that can't be subclassed, such as a fake tensor.
        made: SummedWeight = Tensor._make_subclass(SummedWeight, _NOTHING)
        made.base, made.left, made.right, made._pieces = base, left, right, None
        return made

    def formed(self) -> Tensor:
        """The sum as a plain tensor, in the base weight's dtype."""
        with torch._C.DisableTorchFunctionSubclass():
            base, left, right = self.base, self.left, self.right
            wide = base if base.element_size() >= left.element_size() else base.to(left.dtype)
            return (wide + (left @ right).to(wide.dtype)).to(base.dtype)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in _ASKED:
                return function(*tree_map(_base, args), **kwargs)
            handler = _HANDLERS.get(function)
            result = handler(*args, **kwargs) if handler else NotImplemented
            if result is not NotImplemented:
                return result
            _tell(function, next(leaf for leaf in tree_leaves((args, kwargs)) if _is_sum(leaf)))
            return function(*tree_map(_formed, args), **tree_map(_formed, kwargs))


def _is_sum(value: Any) -> bool:
    return isinstance(value, SummedWeight)


def _base(value: Any) -> Any:
    return value.base if _is_sum(value) else value


def _formed(value: Any) -> Any:
    return value.formed() if _is_sum(value) else value


def _tell(function: Any, weight: SummedWeight) -> None:
    megabytes = weight.base.numel() * weight.base.element_size() / 1e6
    warnings.warn(
        f"The model uses an adapted parameter in `{getattr(function, '__name__', function)}`, which needs the weight "
        f"and its update as one tensor: {megabytes:.3g} MB more each time. It works, but takes that memory.",
        stacklevel=4,
    )


# Products. In each, ``x`` is anything but another summed weight.


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not _is_sum(weight) or _is_sum(x) or weight.base.dim() != 2:
        return NotImplemented
    output = F.linear(x, weight.base, bias)
    left, right = _as_input(weight, x)
    return _added(output, F.linear(F.linear(x, right), left))


def _matmul(a: Any, b: Any) -> Any:
    weight, x = (b, a) if _is_sum(b) else (a, b)
    if _is_sum(x):
        return NotImplemented
    left, right = _as_input(weight, x)
    if weight is b:
        return _added(x @ weight.base, (x @ left) @ right)
    return _added(weight.base @ x, left @ (right @ x))


def _bmm(a: Any, b: Any, *others: Any, **options: Any) -> Any:
    return NotImplemented if others or options else _matmul(a, b)


def _reversed_matmul(b: Any, a: Any) -> Any:
    return _matmul(a, b)


def _grouped_mm(x: Any, weight: Any, offs: Tensor | None = None, **options: Any) -> Any:
    others = any(value is not None for value in options.values())
    if not _is_sum(weight) or _is_sum(x) or x.dim() != 2 or offs is None or others:
        return NotImplemented
    output = _grouped(x, weight.base, offs)
    # Autocast does not cast for this product.
    left, right = _aligned(weight.left.to(x.dtype), weight.right.to(x.dtype))
    return _added(output, _grouped(_grouped(x, left, offs), right, offs))


def _grouped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    if hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weight, offs=offs)
    return torch._grouped_mm(x, weight, offs=offs)


def _as_input(weight: SummedWeight, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in the input's dtype; autocast takes care of that itself."""
    if torch.is_autocast_enabled(x.device.type):
        return weight.left, weight.right
    return weight.left.to(x.dtype), weight.right.to(x.dtype)


def _aligned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors, padded with zeros to a rank that grouped products accept."""
    k, step = left.shape[-1], max(_ALIGNMENT // left.element_size(), 1)
    if k % step == 0:
        return left, right
    spare = step - k % step
    return F.pad(left, (0, spare)), F.pad(right, (0, 0, 0, spare))


def _added(output: Tensor, update: Tensor) -> Tensor:
    """Add in place, which is safe because products don't save their output for the backward pass."""
    return output.add_(update.to(output.dtype))


# Views and casts: of the base weight and of the factors.


def _item(weight: Any, index: Any) -> Any:
    if not _is_sum(weight):
        return NotImplemented
    if weight.base.dim() == 2:  # rows, such as biases, which are small
        rows = weight.left[index]
        return weight.base[index] + (rows @ weight.right).to(weight.base.dtype)
    if isinstance(index, tuple):
        return NotImplemented
    one = isinstance(index, int) or (
        isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool
    )
    if one and not torch.compiler.is_compiling():
        return _unbind(weight)[int(index)]
    return SummedWeight.make(weight.base[index], weight.left[index], weight.right[index])


def _unbind(weight: Any, dim: int = 0) -> Any:
    """All pieces at once. If they were taken one by one, the gradient of each would be as large as the factors."""
    if dim != 0 or weight.base.dim() != 3:
        return NotImplemented
    if weight._pieces is None:
        pieces = zip(weight.base.unbind(0), weight.left.unbind(0), weight.right.unbind(0), strict=True)
        weight._pieces = tuple(SummedWeight.make(*piece) for piece in pieces)
    return weight._pieces


def _swapped(weight: SummedWeight) -> SummedWeight:
    return SummedWeight.make(weight.base.mT, weight.right.mT, weight.left.mT)


def _transpose(weight: Any, first: int, second: int) -> Any:
    dimensions = weight.base.dim()
    if {first % dimensions, second % dimensions} != {dimensions - 1, dimensions - 2}:
        return NotImplemented
    return _swapped(weight)


def _transposed(weight: Any) -> Any:
    return _swapped(weight) if weight.base.dim() == 2 else NotImplemented


def _each(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """For functions such as ``float`` that change no shape."""

    def apply(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(_is_sum, tree_leaves((args, kwargs)))):
            return NotImplemented
        parts = (weight.base, weight.left, weight.right)
        return SummedWeight.make(*(function(part, *args, **kwargs) for part in parts))

    return apply


_ASKED = frozenset(
    [getattr(Tensor, name).__get__ for name in (
        "dtype", "device", "shape", "layout", "ndim", "is_cuda", "is_cpu", "is_meta", "is_leaf", "requires_grad",
        "itemsize", "nbytes", "is_sparse", "is_quantized",
    )]
    + [getattr(Tensor, name) for name in (
        "size", "dim", "numel", "stride", "data_ptr", "element_size", "is_floating_point", "is_contiguous",
        "is_complex", "storage_offset", "get_device", "__len__", "ndimension", "nelement",
    )]
)  # fmt: skip

_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _reversed_matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    Tensor.__getitem__: _item,
    torch.unbind: _unbind,
    Tensor.unbind: _unbind,
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    Tensor.mT.__get__: _swapped,  # type: ignore[attr-defined]
    Tensor.T.__get__: _transposed,  # type: ignore[attr-defined]
    Tensor.t: _transposed,
    torch.t: _transposed,
    **{
        function: _each(function)
        for function in (
            Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.contiguous,
            Tensor.type_as,
        )
    },
}  # fmt: skip
_HANDLERS.update(
    (getattr(owner, name), _grouped_mm)
    for owner, name in ((torch, "_grouped_mm"), (F, "grouped_mm"))
    if hasattr(owner, name)
)
