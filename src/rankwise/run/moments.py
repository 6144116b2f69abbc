"""What an optimizer remembers of a parameter, moved along when the parameter is turned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.parallel.sharded import gather, local, local_like
from rankwise.parallel.zero import ZeroParts

# Names of state tensors of a parameter's shape, in torch's optimizers, bitsandbytes and schedule-free.
_MEANS = ("exp_avg", "momentum_buffer", "state1")  # of gradients
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "state2")  # means of squared gradients
_WEIGHTS = ("z",)  # another point at which the parameter may stand
_KINDS = {
    **dict.fromkeys(_MEANS, "mean"),
    **dict.fromkeys(_SQUARES, "square"),
    **dict.fromkeys(_WEIGHTS, "weight"),
}


class Turn(NamedTuple):
    """How one factor of n blocks is turned: each block of rows ``A' = weight A``; of B the same of its transpose.

    Args:
        weight: (n, r, r), what the factor itself is multiplied by.
        gradient: (n, r, r), what its gradients are multiplied by: the inverse of ``weight``, transposed.
    """

    weight: Tensor
    gradient: Tensor

    def of(self, kind: str) -> Tensor:
        """What a state tensor of a kind, "mean", "square" or "weight", is multiplied by."""
        if kind == "weight":
            return self.weight
        return self.gradient if kind == "mean" else self.gradient.square()

    def applied(self, kind: str, state: Tensor, columns: bool) -> Tensor:
        """A state tensor of a kind, turned: of A (n r, d_in), or of B (d_out, n r), whose ``columns`` are triplets."""
        matrices, rows = self.of(kind), (state.T if columns else state)
        rows = rows.to(matrices)
        turned = (matrices @ rows.reshape(*matrices.shape[:2], rows.shape[1])).view(rows.shape)
        return turned.T if columns else turned


def turn_moments(
    optimizers: Iterable[Optimizer], parameters: Sequence[nn.Parameter], turns: Sequence[Turn], columns: bool
) -> None:
    """Turn what optimizers remember of some factors.

    Running means of gradients and of their squares, as Adam's and SGD's, are turned. What can't be, as 8-bit moments
    and Adafactor's, is forgotten for these factors, and the optimizer begins it anew.

    Args:
        optimizers: those that may hold them.
        parameters: all A (r, d_in), or all B (d_out, r).
        turns: one for each.
        columns: whether they are B, whose columns are the triplets.
    """
    for optimizer in optimizers:
        places = [n for n, parameter in enumerate(parameters) if optimizer.state.get(parameter)]
        turnable = [n for n in places if _can_be_turned(optimizer.state[parameters[n]], parameters[n])]
        for n in places:
            if n not in turnable:
                del optimizer.state[parameters[n]]
        names = dict.fromkeys(name for n in turnable for name in _of_its_shape(optimizer, parameters[n]))
        for name in names:
            held = [n for n in turnable if name in optimizer.state[parameters[n]]]
            states = [optimizer.state[parameters[n]][name] for n in held]
            turned = _turned(_KINDS[name], [turns[n] for n in held], gather(states), columns)
            torch._foreach_copy_(
                [local(state) for state in states],
                [local_like(new, state) for new, state in zip(turned, states, strict=True)],
            )


def _turned(kind: str, turns: Sequence[Turn], states: Sequence[Tensor], columns: bool) -> list[Tensor]:
    """State tensors of a kind, turned; those of one shape in one product, as there may be hundreds of layers."""
    alike: dict[Any, list[int]] = {}
    for n, (turn, state) in enumerate(zip(turns, states, strict=True)):
        alike.setdefault(
            (turn.weight.shape, turn.weight.device, state.shape, state.dtype, state.device), []
        ).append(n)
    turned = [states[0]] * len(states)
    for places in alike.values():
        together = Turn(*(torch.cat(each) for each in zip(*(turns[n] for n in places), strict=True)))
        size = states[places[0]].shape[1 if columns else 0]  # triplets of each
        stacked = torch.stack([states[n].T if columns else states[n] for n in places])
        rows = together.applied(kind, stacked.flatten(0, 1), columns=False)
        for n, new in zip(places, rows.split([size] * len(places)), strict=True):
            turned[n] = new.T if columns else new
    return turned


def _of_its_shape(optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[str]:
    for name, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() == 2:
            yield name


def _can_be_turned(state: dict[str, Any], parameter: nn.Parameter) -> bool:
    """Whether all that is remembered is numbers of the whole step, or known tensors of the parameter's shape."""
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1:
            continue
        if name not in _KINDS or value.shape != parameter.shape or not value.is_floating_point():
            return False
    return True


def turn_moments_of_parts(
    optimizers: Iterable[Optimizer], parts: ZeroParts, turns: Mapping[int, Turn], columns: bool
) -> None:
    """As `turn_moments`, where DeepSpeed ZeRO steps parts of the factors; all processes call it together.

    Args:
        optimizers: those that step parts.
        parts: the adapter's, as ZeRO holds them.
        turns: number among ``parts`` -> how it is turned.
        columns: whether they are B.
    """
    numbers = list(turns)
    for optimizer in optimizers:
        for name, kind in _KINDS.items():
            pieces = list(parts.remembered(optimizer, name))
            if not parts.any(bool(pieces)):
                continue
            whole = parts.gathered(numbers, pieces, lambda piece: piece.gradient)
            for number, values in zip(numbers, whole, strict=True):
                turned = turns[number].applied(kind, values, columns)
                for piece in pieces:
                    if piece.number == number:
                        end = piece.start + piece.gradient.numel()
                        piece.gradient.copy_(turned.reshape(-1)[piece.start : end])
