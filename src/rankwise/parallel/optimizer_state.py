"""The state that optimizers keep of a parameter: which state can be rewritten in another basis, and how to reset it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from rankwise.parallel.sharded import local

# Names of the state tensors of a parameter's shape in PyTorch's optimizers, bitsandbytes and schedule-free.
_MEANS = ("exp_avg", "momentum_buffer", "grad_avg", "state1")  # means of gradients
# Means or sums of squared gradients.
_SQUARES = (
    "exp_avg_sq",
    "max_exp_avg_sq",
    "square_avg",
    "sum",
    "state2",
)
_WEIGHTS = ("z", "ax")  # other points in the space of weights
KINDS = {
    **dict.fromkeys(_MEANS, "gradient"),
    **dict.fromkeys(_SQUARES, "square"),
    **dict.fromkeys(_WEIGHTS, "weight"),
}


def kind_of(optimizer: Optimizer, name: str, names: Iterable[str]) -> str:
    """The kind of a state tensor: "gradient", "square" (of a gradient) or "weight" (a weight, or a change of one).

    Args:
        optimizer: the optimizer that keeps the state.
        name: name of the state tensor, one of `KINDS`.
        names: names of all state tensors of the same parameter.

    Example:
        >>> import torch
        >>> rmsprop = torch.optim.RMSprop([torch.zeros(1)], momentum=0.9)
        >>> kind_of(rmsprop, "momentum_buffer", ["square_avg", "momentum_buffer"])  # it sums up steps
        'weight'
    """
    if name == "momentum_buffer" and "square_avg" in names:
        return "weight"
    # bitsandbytes uses one name for both kinds, and stores the name of its algorithm.
    if name == "state1" and getattr(optimizer, "optimizer_name", None) in ("rmsprop", "adagrad"):
        return "square"
    return KINDS[name]


def can_be_rewritten(state: dict[str, Any], parameter: nn.Parameter) -> bool:
    """Whether every tensor in ``state`` is a single number or a known tensor of the parameter's shape."""
    for name, value in state.items():
        if isinstance(value, (list, tuple, dict)) and value:
            return False
        if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1:
            continue
        if name not in KINDS or value.shape != parameter.shape or _is_quantized(value):
            return False
    return True


def is_quantized(state: dict[str, Any]) -> bool:
    """Whether any tensor in ``state`` is kept in fewer bits, so that a 0 in it may come back as another number."""
    tensors = (value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1)
    return any(map(_is_quantized, tensors))


def _is_quantized(value: Tensor) -> bool:
    """Tensors of bitsandbytes are integers; torchao has a class of tensors of its own."""
    return not value.is_floating_point() or type(local(value)) not in (Tensor, nn.Parameter)


def forget_all_together(optimizer: Optimizer) -> None:
    """Reset an optimizer whose state is not stored by parameter.

    ``LBFGS`` stores the state of all parameters in one vector. PEFT's LoRA-FA stores it by name.
    """
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
        optimizer._numel_cache = None
    for key in [key for key in optimizer.state if not isinstance(key, Tensor)]:
        del optimizer.state[key]


def start_anew(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Reset the state that ``optimizer`` keeps of ``parameter``, as if it had not stepped yet.

    Most optimizers make their state in the first step, so the state is removed. Some make it in their constructor and
    fail without it, so another optimizer of the same class is made and its state taken. If the constructor needs other
    arguments, the state is set to 0 in place. A state of few bits is removed even then, since its zeros stand for
    other numbers. The 8-bit state of bitsandbytes is set to that of its first step in place, because the memory of its
    paged optimizers is never freed.
    """
    if _restart_blocks(optimizer.state.get(parameter, {}), parameter):
        return
    fresh = _made_in_constructor(optimizer, parameter)
    if fresh is None and not is_quantized(optimizer.state.get(parameter, {})):
        _become_zero(optimizer.state.get(parameter, {}), parameter)
    elif fresh:
        optimizer.state[parameter] = fresh
    else:
        optimizer.state.pop(parameter, None)


def _restart_blocks(state: dict[str, Any], parameter: nn.Parameter) -> bool:
    """Restart a state that bitsandbytes keeps in 8 bits and blocks, and return whether it is one.

    Each block is the product of its numbers and their largest one, which is 0 at the start.
    """
    held, largest = ([state[key + n] for n in "12" if key + n in state] for key in ("state", "absmax"))
    if not largest or len(largest) != len(held):
        return False
    if any(each.dtype != torch.uint8 or each.shape != parameter.shape for each in held):
        return False
    for each in [*held, *largest, *(state[key] for key in ("unorm_vec",) if key in state)]:
        each.zero_()
    state["step"] = 0
    return True


def _made_in_constructor(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any] | None:
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
    stand_in = nn.Parameter(parameter.detach().clone())
    try:
        # In bitsandbytes, `defaults` also has arguments that only the base class takes.
        takes = inspect.signature(type(optimizer)).parameters
        settings = {name: group[name] for name in optimizer.defaults if name in group and name in takes}
        return dict(type(optimizer)([stand_in], **settings).state.get(stand_in, {}))
    except Exception:  # a constructor that needs other arguments may raise anything
        return None


def _become_zero(state: dict[Any, Any], parameter: nn.Parameter) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor) and (value.shape == parameter.shape or value.numel() == 1):
            value.zero_()
        elif isinstance(value, dict):
            _become_zero(value, parameter)
        elif isinstance(value, (list, tuple)):
            _become_zero(dict(enumerate(value)), parameter)
        elif name == "step" and isinstance(value, int):
            state[name] = 0
