"""A linear layer whose weight is frozen, dense or packed, and its adapter's branch, as one step of autograd.

It computes what `Down`, the base layer and `Up` compute one after the other (see `rankwise.adapters.branch`), with the
same operations, and saves the same tensors. A step of autograd that is written in Python takes as long as launching
several operations, and small batches on a GPU wait for that. Here there is one such step instead of two, and the base
layer needs none of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.branch import (
    Kept,
    add_share,
    add_up,
    apply_of,
    cast,
    composed_hidden,
    composed_update,
    differentiated,
    factor_gradients,
    flat,
    gradient_of_B,
    hidden_of,
    product_down,
    results_are_kept,
    scaled_product,
    without_cut,
)


def is_frozen(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a base layer has a weight that is here as a whole, and neither the weight nor the bias trains.

    DeepSpeed ZeRO holds weights in pieces. A packed weight has a class of its own, and never trains.
    """
    if weight is None or "ds_id" in vars(weight):
        return False
    if type(weight) is nn.Parameter and weight.requires_grad:  # a packed weight takes long to answer
        return False
    return bias is None or not (bias.requires_grad or "ds_id" in vars(bias))


class Packed(NamedTuple):
    """A base layer whose weight is packed: there is no dense weight to save.

    Args:
        layer: the base layer.
        forward: its own.
        hold: ``hold(layer, dtype)`` returns what ``unpack`` needs for an input of this dtype. It is called after
            ``forward``, which may repack the weight.
        unpack: makes the dense weight, (d_out, d_in), in the backward pass.
    """

    layer: Any
    forward: Callable[[Tensor], Tensor]
    hold: Callable[[Any, torch.dtype], tuple[Any, ...]]
    unpack: Callable[..., Tensor]


class How(NamedTuple):
    """The inputs that get no gradients.

    Args:
        weight: the base layer's, (d_out, d_in), or the layer itself if its weight is packed.
        bias: the base layer's, (d_out,), or None. A packed layer adds its own.
        kept: which triplets act.
        folded: A with the gates folded in, (r, d_in), in the dtype of the input.
        gates: the gates of A, as `gates_of` returns them.
        up: B, (d_out, r), in the dtype of the output.
        scaling: the scale of the branch.
        rate: the rate of dropout.
        dtype: the dtype in which autocast computes the base layer. None: no autocast.
    """

    weight: Tensor | Packed
    bias: Tensor | None
    kept: Kept
    folded: Tensor
    gates: Tensor | None
    up: Tensor
    scaling: float
    rate: float
    dtype: torch.dtype | None


class _AdaptedLinear(torch.autograd.Function):
    """``x W^T + bias + scaling * (dropout(x) (A * E)^T) B^T``; gradients go to x, A, E and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, E: Tensor | None, B: Tensor, how: How) -> Tensor:
        rows, mask, weight = flat(x), None, how.weight
        if how.rate or how.dtype not in (None, x.dtype):
            hidden, mask = hidden_of(x, how.folded, how.rate)
        else:
            hidden = product_down(rows, how.folded)
        saved_weight = ctx.packed = None
        if type(weight) is Packed:
            layer, forward, hold, unpack = weight
            # A packed weight is a subclass of Tensor. Without the subclass's own handling, its use takes less time.
            with torch._C.DisableTorchFunctionSubclass():
                output = flat(forward(x))
                if ctx.needs_input_grad[0]:
                    ctx.packed = unpack, hold(layer, x.dtype)
        else:
            # Detached, so that it stays the same if the parameter's data are exchanged before the backward pass.
            dense: Tensor = weight.detach()  # type: ignore[union-attr]
            if how.dtype is not None:
                dense = cast(dense, how.dtype)
            output = F.linear(rows, dense, how.bias)
            if ctx.needs_input_grad[0]:
                saved_weight = dense
        hidden, up = cast(hidden, output.dtype), cast(how.up, output.dtype)
        ctx.save_for_backward(x, A, E, B, saved_weight, hidden, mask, how.folded, how.gates, up)
        ctx.kept, ctx.scaling = how.kept, how.scaling
        if mask is not None:
            ctx.shape, ctx.in_place = x.shape, True
            ctx.upscale = 1 / (1 - how.rate) if how.rate < 1 else 0.0
        ctx.set_materialize_grads(False)
        if results_are_kept():
            output = output.view(*x.shape[:-1], output.shape[1])
            return add_up(output, hidden, up, how.kept, how.scaling, in_place=False)
        if how.kept is not None:
            hidden, up = without_cut(hidden, up, 1, how.kept, output.numel())
        output.addmm_(hidden, up.t(), alpha=how.scaling)
        # Detached, so that autograd sees a tensor, not a view: the following layers may change it in place.
        if x.dim() == 2 and not output._is_view():
            return output
        return output.view(*x.shape[:-1], output.shape[1]).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        if gradient is None:
            return (None,) * 5
        x, A, E, B, weight, hidden, mask, folded, gates, up = ctx.saved_tensors
        to_x, to_A, to_E, to_B = ctx.needs_input_grad[:4]
        rows = flat(gradient)
        if ctx.packed is not None:
            unpack, held = ctx.packed
            weight = unpack(*held)
        if torch.is_grad_enabled():  # for a second derivative

            def output(x: Tensor, A: Tensor, E: Tensor | None, B: Tensor) -> Tensor:
                hidden = composed_hidden(ctx, x, A, E, mask)
                added = composed_update(ctx, hidden.to(rows.dtype), B)
                return added if weight is None else added + flat(x).to(rows.dtype) @ weight.to(rows.dtype).T

            return *differentiated(output, (x, A, E, B), (to_x, to_A, to_E, to_B), rows), None
        from_hidden = scaled_product(rows, up, ctx.scaling, hidden)
        gradient_B = gradient_of_B(rows, hidden, ctx.scaling, up) if to_B else None
        from_hidden = cast(from_hidden, x.dtype)
        gradient_x = None
        if to_x:
            from_base = cast(torch.mm(cast(rows, weight.dtype), weight), x.dtype)
            if mask is None:
                from_base.addmm_(*without_cut(from_hidden, folded, 0, ctx.kept, x.numel()))
            gradient_x = from_base if x.dim() == 2 else from_base.view_as(x)
            if mask is not None:
                gradient_x = add_share(ctx, gradient_x, from_hidden, folded, mask)
        if gates is None and mask is None and E is None:  # plain LoRA
            gradient_A = torch.mm(from_hidden.t(), flat(x)) if to_A else None
            return gradient_x, gradient_A, None, gradient_B, None
        return gradient_x, *factor_gradients(ctx, from_hidden, x, A, gates, mask), gradient_B, None


adapted_linear = apply_of(_AdaptedLinear)
