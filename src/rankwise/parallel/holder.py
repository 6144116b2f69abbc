"""Access to an adapter's factors, wherever they are: whole in this process, in DTensors, or in DeepSpeed ZeRO's parts.

The method reads whole factors, writes whole factors, and looks at the gradients of a step. A `Holder` does this for
each way of storing factors. Each parameter has a number: its position in the holder's list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.parallel.optimizer_state import KINDS, can_be_rewritten, start_anew
from rankwise.parallel.sharded import gather, local, local_like, squared_norms


class Measured(NamedTuple):
    """A factor and the blocks of ranks whose gradient norms are wanted.

    Args:
        number: number of the factor's parameter.
        blocks: number of blocks into which its ranks are divided, at least 1.
        order: order that sorts its ranks by block, (ranks,), int64. None: they are sorted already.
    """

    number: int
    blocks: int
    order: Tensor | None = None


class Step(Protocol):
    """The step of an optimizer, just before or just after it, while the gradients are still there."""

    numbers: Sequence[int]  # numbers of the parameters that the optimizer steps, in rising order

    def has_gradients(self, numbers: Sequence[int]) -> list[bool]:
        """For each of ``numbers``, whether the parameter has a gradient in this step."""

    def values(self, numbers: Sequence[int]) -> list[Tensor]:
        """The values of the parameters ``numbers``, whole."""

    def products(self, numbers: Sequence[int]) -> list[Tensor | None]:
        """The products of weight and gradient, whole, in float32 or wider. None where there is no gradient."""

    def squared_norms(self, measured: Sequence[Measured], device: torch.device) -> Tensor:
        """The squared norm of each block's gradient, (total number of blocks,), float32; 0 without a gradient."""

    def add_to_gradients(self, added: Mapping[int, Tensor]) -> None:
        """Add whole tensors, each in its parameter's shape, to the gradients."""


class Holder(Protocol):
    """Reads and writes whole factors."""

    def whole(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return the parameters whole. All processes must call it together."""

    def write(self, values: Mapping[int, Tensor]) -> None:
        """Give parameters new values, each in the parameter's shape."""

    def state_names(self, optimizer: Optimizer, numbers: Sequence[int]) -> list[str]:
        """Names of the state tensors of ``numbers`` that have their parameter's shape.

        State that cannot be rewritten in another basis is reset.
        """

    def states(
        self, optimizer: Optimizer, name: str, numbers: Sequence[int], done: set[int]
    ) -> dict[int, Tensor]:
        """The state tensors ``name``, whole, by number. Those in ``done`` are left out; new ones join it."""

    def write_states(self, optimizer: Optimizer, name: str, values: Mapping[int, Tensor]) -> None:
        """Replace the state tensors ``name``."""

    def gradients(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """The gradients that no optimizer has used yet, whole, by number."""

    def write_gradients(self, values: Mapping[int, Tensor]) -> None:
        """Replace the gradients that no optimizer has used yet."""


class TensorHolder:
    """Holds factors in plain tensors, or in DTensors as ``fully_shard`` makes them.

    Args:
        parameter: function that returns the parameter of a number. It is called at each use, as parameters may change.
    """

    def __init__(self, parameter: Callable[[int], nn.Parameter]) -> None:
        self._parameter = parameter

    def whole(self, numbers: Sequence[int]) -> list[Tensor]:
        return [each.detach() for each in gather([self._parameter(number) for number in numbers])]

    def write(self, values: Mapping[int, Tensor]) -> None:
        self._copy([self._parameter(number) for number in values], list(values.values()))

    def state_names(self, optimizer: Optimizer, numbers: Sequence[int]) -> list[str]:
        names: dict[str, None] = {}
        for parameter in map(self._parameter, numbers):
            state = optimizer.state.get(parameter)
            if not state:
                continue
            if not can_be_rewritten(state, parameter):
                start_anew(optimizer, parameter)
                continue
            shaped = (n for n, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape)
            names.update(dict.fromkeys(name for name in shaped if name in KINDS))
        return list(names)

    def states(
        self, optimizer: Optimizer, name: str, numbers: Sequence[int], done: set[int]
    ) -> dict[int, Tensor]:
        held = self._held_states(optimizer, name, numbers)
        places = {number: local(value).data_ptr() for number, value in held.items()}
        held = {number: value for number, value in held.items() if places[number] not in done}
        done.update(places[number] for number, value in held.items() if value.numel())
        return dict(zip(held, gather(list(held.values())), strict=True))

    def write_states(self, optimizer: Optimizer, name: str, values: Mapping[int, Tensor]) -> None:
        held = self._held_states(optimizer, name, list(values))
        self._copy(list(held.values()), [values[number] for number in held])

    def _held_states(self, optimizer: Optimizer, name: str, numbers: Sequence[int]) -> dict[int, Tensor]:
        held = {}
        for number in numbers:
            parameter = self._parameter(number)
            value = optimizer.state.get(parameter, {}).get(name)
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                held[number] = value
        return held

    def gradients(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        found = ((number, self._parameter(number).grad) for number in numbers)
        held = {number: gradient for number, gradient in found if gradient is not None}
        return dict(zip(held, gather(list(held.values())), strict=True))

    def write_gradients(self, values: Mapping[int, Tensor]) -> None:
        self._copy([self._parameter(number).grad for number in values], list(values.values()))

    @staticmethod
    def _copy(targets: Sequence[Tensor | None], values: Sequence[Tensor]) -> None:
        if targets:
            torch._foreach_copy_(
                [local(target) for target in targets],
                [local_like(value, target) for value, target in zip(values, targets, strict=True)],
            )


class TensorStep:
    """An optimizer's step on parameters that the optimizer itself holds. Their gradients are in ``.grad``.

    Args:
        parameter: function that returns the parameter of a number.
        numbers: numbers of the parameters that the optimizer holds.
        optimizer: the optimizer; needed only to add to gradients.
    """

    def __init__(
        self,
        parameter: Callable[[int], nn.Parameter],
        numbers: Sequence[int],
        optimizer: Optimizer | None = None,
    ) -> None:
        self._parameter, self.numbers, self._optimizer = parameter, numbers, optimizer

    def has_gradients(self, numbers: Sequence[int]) -> list[bool]:
        return [self._parameter(number).grad is not None for number in numbers]

    def values(self, numbers: Sequence[int]) -> list[Tensor]:
        return gather([self._parameter(number).detach() for number in numbers])

    def products(self, numbers: Sequence[int]) -> list[Tensor | None]:
        parameters = [self._parameter(number) for number in numbers]
        weights = [parameter.detach() for parameter in parameters]
        filled = [torch.zeros_like(p.detach()) if p.grad is None else p.grad for p in parameters]
        if any(weight.element_size() < 4 for weight in weights):
            weights, filled = [w.float() for w in weights], [g.float() for g in filled]
        products = gather(torch._foreach_mul(weights, filled))
        return [None if p.grad is None else each for p, each in zip(parameters, products, strict=True)]

    def squared_norms(self, measured: Sequence[Measured], device: torch.device) -> Tensor:
        gradients = [self._parameter(each.number).grad for each in measured]
        blocks, orders = [each.blocks for each in measured], [each.order for each in measured]
        return squared_norms(gradients, blocks, device, orders)

    def add_to_gradients(self, added: Mapping[int, Tensor]) -> None:
        scale = getattr(self._optimizer, "grad_scale", None)  # a fused optimizer unscales them later
        values = list(added.values())
        if scale is not None:
            torch._foreach_mul_(values, scale)
        gradients = [self._parameter(number).grad for number in added]
        torch._foreach_add_(
            [local(gradient) for gradient in gradients],
            [local_like(one, gradient) for one, gradient in zip(values, gradients, strict=True)],
        )
