"""The adapter's branch of a linear layer, ``scaling * (x A^T) B^T``, computed in few passes over wide tensors.

The branch has two parts, and the base layer runs between them. `Down` computes ``hidden`` (tokens, r) from the layer's
input, and hands the input on to the base layer. `Up` adds ``hidden B^T`` to the base layer's output. So in the backward
pass `Down` receives the base layer's gradient of the input, and adds its own share in place. Written as a composition,
the output and the input's gradient would each be made twice and added. The base layer's weight is mostly frozen. Then
all three are one step of autograd: `rankwise.adapters.fused`.

Every product is computed in the dtype of the wide tensor that it reads, so that no wide tensor is copied: under
autocast x may be float32 and the output bfloat16. The backward pass needs ``hidden`` and x. Layers with the same input
share x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_KEEPERS = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")

_WORTH_CUTTING = 2**19  # multiplications, which take as long as the two views: measured on a CPU
_WORTH_TURNING = 2**14  # numbers in the wide matrix, from which on `turns` saves time: measured on a CPU
_FEW_COLUMNS = range(2, 16)  # ranks for which `turns` saves time: measured on a CPU
_HAS_MKL = torch.backends.mkl.is_available()
# Whether autocast is on for any device. This takes a fraction of the time that a tensor's own device takes.
_some_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

Kept = int | Tensor | None  # which triplets act: the first n, those with these indices, all


class Down(torch.autograd.Function):
    """x (..., d_in) as it is, and ``hidden = dropout(x) (A * E)^T`` (tokens, r), in the dtype of x.

    Takes x; A (r, d_in) and E (r, 1) or None, to which the gradients go; which triplets act; A with the gates folded
    in, in the dtype of x, and the gates, as `gates_of` has them; the rate of dropout; and whether the gradient that
    comes for x is a new tensor, which may be added to in place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, E: Tensor | None, kept: Kept, folded: Tensor, gates: Tensor | None,
        rate: float, in_place: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        hidden, mask = hidden_of(x, folded, rate)
        to_x, to_A, to_E = ctx.needs_input_grad[:3]
        if not to_x:
            ctx.mark_non_differentiable(x)
        saved_x = x if to_A or to_E else None
        ctx.save_for_backward(saved_x, A, E, mask, folded if to_x else None, gates if to_A else None)
        ctx.shape, ctx.kept, ctx.in_place = x.shape, kept, in_place
        ctx.upscale = 1 / (1 - rate) if rate < 1 else 0.0
        ctx.set_materialize_grads(False)
        return x, hidden

    @staticmethod
    def backward(ctx: Any, from_base: Tensor | None, from_hidden: Tensor | None) -> tuple[Any, ...]:
        x, A, E, mask, folded, gates = ctx.saved_tensors
        to_x, to_A, to_E = ctx.needs_input_grad[:3]
        nothing = (None,) * 5
        if from_hidden is None:
            return from_base, None, None, *nothing
        if torch.is_grad_enabled():  # for a second derivative
            x = from_hidden.new_zeros(ctx.shape, requires_grad=True) if x is None else x

            def hidden(x: Tensor, A: Tensor, E: Tensor | None) -> Tensor:
                return composed_hidden(ctx, x, A, E, mask)

            own, *rest = differentiated(hidden, (x, A, E), (to_x, to_A, to_E), from_hidden)
            return own if from_base is None or own is None else from_base + own, *rest, *nothing
        gradient_x = add_share(ctx, from_base, from_hidden, folded, mask) if to_x else None
        return gradient_x, *factor_gradients(ctx, from_hidden, x, A, gates, mask), *nothing


class Up(torch.autograd.Function):
    """``output + scaling * hidden B^T``, for an output (..., d_out) and in its dtype.

    Takes the output and hidden (tokens, r); B (d_out, r), to which the gradient goes; which triplets act; B in the
    output's dtype; the scaling; and whether the output is a new tensor, which may be added to in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        hidden: Tensor,
        B: Tensor,
        kept: Kept,
        ready: Tensor,
        scaling: float,
        in_place: bool,
    ) -> Tensor:
        hidden = cast(hidden, output.dtype)
        ctx.save_for_backward(hidden, B, ready)
        ctx.kept, ctx.scaling = kept, scaling
        ctx.set_materialize_grads(False)
        return add_up(output, hidden, ready, kept, scaling, in_place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        hidden, B, ready = ctx.saved_tensors
        to_hidden, to_B = ctx.needs_input_grad[1:3]
        nothing = (None,) * 4
        if gradient is None:
            return None, None, None, *nothing
        rows = flat(gradient)
        if torch.is_grad_enabled():  # for a second derivative

            def added(hidden: Tensor, B: Tensor) -> Tensor:
                return composed_update(ctx, hidden, B)

            return gradient, *differentiated(added, (hidden, B), (to_hidden, to_B), rows), *nothing
        gradient_hidden = scaled_product(rows, ready, ctx.scaling, ready[:1]) if to_hidden else None
        gradient_B = gradient_of_B(rows, hidden, ctx.scaling, ready[:1]) if to_B else None
        return gradient, gradient_hidden, gradient_B, *nothing


class ScaledUp(torch.autograd.Function):
    """``scaling * hidden B^T`` (..., d_out) in hidden's dtype, for compilers.

    If the scaling is a number, the backward pass multiplies narrow tensors by it, within their products. The
    derivatives that a compiler finds by itself multiply the wide gradient, and hold the product as a second wide
    tensor. If the scaling is a 0-dim tensor, the wide gradient is multiplied here, too.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, B: Tensor, scaling: float | Tensor) -> Tensor:
        up = B.to(hidden.dtype)
        is_tensor = isinstance(scaling, Tensor)
        ctx.save_for_backward(hidden, up, scaling if is_tensor else None)
        ctx.scaling, ctx.dtype = None if is_tensor else scaling, B.dtype
        return F.linear(hidden, up) * scaling

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, up, scaling = ctx.saved_tensors
        to_hidden, to_B = ctx.needs_input_grad[:2]
        narrow, rows = flat(hidden), flat(gradient if scaling is None else gradient * scaling)
        gradient_hidden = gradient_B = None
        if to_hidden:
            gradient_hidden = _scaled(rows, up, ctx.scaling, up[:1], _may_turn(rows, up.shape[1])).view(
                hidden.shape
            )
        if to_B and rows.is_cpu:
            # This takes less time than `rows.t() @ narrow`. If no cast follows, autograd copies it into B's layout.
            gradient_B = _turned_product(rows.t(), narrow, ctx.scaling)
        elif to_B:
            gradient_B = _scaled(rows.t(), narrow, ctx.scaling, up[:1], turned=False)
        if gradient_B is not None and gradient_B.dtype != ctx.dtype:
            gradient_B = gradient_B.to(ctx.dtype, memory_format=torch.contiguous_format)
        return gradient_hidden, gradient_B, None


def hidden_of(x: Tensor, A: Tensor, rate: float) -> tuple[Tensor, Tensor | None]:
    """``dropout(x) A^T`` (tokens, r), and where dropout has left x as it is: bool, of x's shape, None if nowhere."""
    dropped, mask = torch.native_dropout(x, rate, True) if rate else (x, None)
    with WithoutAutocast(x):
        return product_down(flat(dropped), A), mask


def add_up(output: Tensor, hidden: Tensor, B: Tensor, kept: Kept, scaling: float, in_place: bool) -> Tensor:
    """``output + scaling * hidden B^T``; hidden (tokens, r) and B (d_out, r) are in the output's dtype."""
    hidden, B = without_cut(hidden, B, 1, kept, output.numel())
    if in_place and output.is_contiguous() and not results_are_kept():
        # Autograd sees a tensor, not a view, so that the following layers may change it in place.
        added = output.detach()
        added.view(-1, output.shape[-1]).addmm_(hidden, B.T, alpha=scaling)
        return added
    with WithoutAutocast(output):
        moved = torch.addmm(flat(output), hidden, B.T, alpha=scaling)
    return moved.view_as(output).detach()


def without_cut(hidden: Tensor, factor: Tensor, axis: int, kept: Kept, size: int) -> tuple[Tensor, Tensor]:
    """The two sides of a product, without the triplets that were cut if that saves time.

    Those triplets are zeros, so that computing with them gives the same result. Leaving them out takes two views. For
    few multiplications, that takes longer than the multiplications do.

    Args:
        hidden: (tokens, r).
        factor: A or B, with its r triplets along ``axis``.
        axis: 0 or 1.
        kept: the triplets that act.
        size: how many numbers the product makes.
    """
    if isinstance(kept, int) and (hidden.shape[1] - kept) * size >= _WORTH_CUTTING:
        return hidden.narrow(1, 0, kept), factor.narrow(axis, 0, kept)  # as slices, in less time
    return hidden, factor


def how_many_act(kept: Kept, rank: int) -> int:
    """The number of first triplets, of ``rank``, to compute with. Those among them that don't act are zeros."""
    return kept if isinstance(kept, int) else rank


def gates_of(A: Tensor, E: Tensor | None, kept: Kept) -> Tensor | None:
    """The gates, (r, 1), that multiply A's rows: E, with zeros for triplets that don't act. None: all gates are 1."""
    if kept is None:
        return E
    acts = torch.zeros(A.shape[0], 1, dtype=A.dtype, device=A.device)
    if isinstance(kept, int):
        acts[:kept] = 1
    else:
        acts.index_fill_(0, kept.to(A.device), 1)  # assigning in place would wait for the GPU
    return acts if E is None else E * acts


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its support of function transforms, which takes as long as an operation or two."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def by_hand() -> bool:
    """Whether derivatives may be written by hand: no compiler, tracer, ``torch.func`` or forward mode is at work."""
    return not torch.compiler.is_compiling() and not torch._C._is_tracing() and only_backward()


def only_backward() -> bool:
    """Whether only backward passes ask for derivatives: neither ``torch.func`` nor forward mode is at work."""
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def results_are_kept() -> bool:
    """Whether selective checkpointing keeps the results of single operations, or reuses kept ones.

    It needs the same operations in both passes, and none that change their arguments.
    """
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(mode).__name__ in _KEEPERS for mode in _get_current_dispatch_mode_stack())


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on a tensor's device. None: it is off."""
    if not _some_autocast():
        return None
    kind = "cpu" if x.is_cpu else x.device.type  # the first question takes a fraction of the second's time
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class WithoutAutocast:
    """Turn autocast off on a tensor's device, as ``torch.autocast(device, enabled=False)`` does.

    This context takes a fraction of that one's time, but compilers don't know it.
    """

    def __init__(self, x: Tensor) -> None:
        self._kind = x.device.type

    def __enter__(self) -> None:
        self._was = torch.is_autocast_enabled(self._kind)
        if self._was:
            torch.set_autocast_enabled(self._kind, False)

    def __exit__(self, *error: object) -> None:
        if self._was:
            torch.set_autocast_enabled(self._kind, True)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values.to(dtype)``, but at no cost if the dtype is the same."""
    return values if values.dtype == dtype else values.to(dtype)


def flat(x: Tensor) -> Tensor:
    """Reshape x (..., d) to (tokens, d)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def add_share(
    ctx: Any, from_base: Tensor | None, from_hidden: Tensor, A: Tensor, mask: Tensor | None
) -> Tensor:
    """The input's gradient: the base layer's, plus the branch's."""
    from_hidden, A = without_cut(from_hidden, A, 0, ctx.kept, ctx.shape.numel())
    if mask is not None:
        own = (from_hidden @ A).mul_(flat(mask)).view(ctx.shape)
        return own.mul_(ctx.upscale) if from_base is None else from_base.add(own, alpha=ctx.upscale)
    if from_base is None:
        return (from_hidden @ A).view(ctx.shape)
    if ctx.in_place and from_base.is_contiguous():
        from_base.view(-1, A.shape[1]).addmm_(from_hidden, A)
        return from_base
    return torch.addmm(flat(from_base), from_hidden, A).view_as(from_base)


def factor_gradients(
    ctx: Any, from_hidden: Tensor, x: Tensor, A: Tensor, gates: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of A and E, the second and third input."""
    to_A, to_E = ctx.needs_input_grad[1:3]
    if not (to_A or to_E):
        return None, None
    matrix = from_hidden.T @ flat(x if mask is None else x * mask)
    if mask is not None:
        matrix.mul_(ctx.upscale)
    gradient_A = gradient_E = None
    if to_A:
        gradient_A = matrix if gates is None else matrix * gates
    if to_E:
        gradient_E = _sums_of_rows(matrix.to(A.dtype), A)
    return gradient_A, gradient_E


def turns(wide: Tensor, rank: int) -> bool:
    """Whether to compute a product of a wide matrix with ``rank`` columns as ``(right^T left^T)^T``.

    In float32, MKL takes up to ten times as long for a result with few columns as for its transpose, which has few
    rows. In half precision, with other ranks and with small matrices, turning the product saves nothing.
    """
    return wide.numel() >= _WORTH_TURNING and _may_turn(wide, rank)


def _may_turn(wide: Tensor, rank: int) -> bool:
    """`turns` for a matrix of unknown size."""
    return rank in _FEW_COLUMNS and wide.dtype == torch.float32 and wide.is_cpu and _HAS_MKL


def product_down(rows: Tensor, A: Tensor) -> Tensor:
    """``rows A^T`` (tokens, r), in the layout that takes less time. rows is (tokens, d_in) and A (r, d_in)."""
    return torch.mm(A, rows.t()).t() if turns(rows, A.shape[0]) else F.linear(rows, A)


def scaled_product(left: Tensor, right: Tensor, scaling: float, row: Tensor) -> Tensor:
    """``scaling * left @ right`` in one operation, for a result with few columns, in the layout that takes less time.

    With beta=0, ``row`` may be any row of the result's width.
    """
    return _scaled(left, right, scaling, row, turns(left, right.shape[1]))


def _scaled(left: Tensor, right: Tensor, scaling: float | None, row: Tensor, turned: bool) -> Tensor:
    if turned:
        return _turned_product(left, right, scaling)
    if scaling is None:
        return left @ right
    return torch.addmm(row, left, right, beta=0, alpha=scaling)


def _turned_product(left: Tensor, right: Tensor, scaling: float | None) -> Tensor:
    wide = left.t()
    if scaling is None:
        return (right.t() @ wide).t()
    return torch.addmm(wide[:1], right.t(), wide, beta=0, alpha=scaling).t()


def gradient_of_B(rows: Tensor, hidden: Tensor, scaling: float, row: Tensor) -> Tensor:
    """``scaling * rows^T hidden`` (d_out, r), in B's layout: autograd would copy a gradient in another one."""
    return scaled_product(rows.t(), hidden, scaling, row).contiguous()


def _sums_of_rows(one: Tensor, other: Tensor) -> Tensor:
    """``(one * other).sum(1, keepdim=True)`` of two matrices in one operation, as a batch of products of vectors."""
    return torch.bmm(one[:, None, :], other[:, :, None])[:, :, 0]


def composed_hidden(ctx: Any, x: Tensor, A: Tensor, E: Tensor | None, mask: Tensor | None) -> Tensor:
    """`hidden_of` as a composition, for derivatives of derivatives."""
    own, thinned = gates_of(A, E, ctx.kept), x if mask is None else x * mask * ctx.upscale
    return flat(thinned) @ (A if own is None else A * own).to(x.dtype).T


def composed_update(ctx: Any, hidden: Tensor, B: Tensor) -> Tensor:
    """The update that `add_up` adds, (tokens, d_out), as a composition."""
    acting = how_many_act(ctx.kept, B.shape[1])
    update: Tensor = ctx.scaling * hidden[:, :acting] @ B[:, :acting].to(hidden.dtype).T
    return update


def differentiated(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """Gradients of ``compute(*inputs)``, which can be differentiated again. None for inputs that need no gradient."""
    wanted = [each for each, need in zip(inputs, needs, strict=True) if need and each is not None]
    found = iter(torch.autograd.grad(compute(*inputs), wanted, gradient, create_graph=True))
    return [next(found) if need else None for need in needs]
