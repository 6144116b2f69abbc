"""Gradients that wait for their optimizer, and what optimizers remember of them, rewritten in another basis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.parallel.optimizer_state import forget_all_together, kind_of
from rankwise.run.factors import Factors


class BasisChange(NamedTuple):
    """How the rows of one factor of n blocks change: each block becomes ``weight @ rows``.

    Args:
        weight: (n, r, r), what the factor itself is multiplied by.
        gradient: (n, r, r), what its gradients are multiplied by: the inverse of ``weight``, transposed.
    """

    weight: Tensor
    gradient: Tensor

    def cut(self, kept: Tensor) -> BasisChange:
        """The same, with all rows 0 but those ``kept``, (n r, 1), bool."""
        blocks, rank = self.weight.shape[:2]
        rows = kept.to(self.weight.device).view(blocks, rank, 1)
        return BasisChange(*(torch.where(rows, each, torch.zeros_like(each)) for each in self))

    def scaled(self, by: float) -> BasisChange:
        """The same, with the factor multiplied by ``by`` besides."""
        return self if by == 1 else BasisChange(self.weight * by, self.gradient / by)

    def of(self, kind: str) -> Tensor:
        """What tensors of a kind are multiplied by: a "weight", a "gradient", or the "square" of one."""
        if kind == "weight":
            return self.weight
        return self.gradient if kind == "gradient" else self.gradient.square()


def rewrite_memory(
    factors: Factors, key: str, changes: Mapping[int, BasisChange], optimizers: Iterable[Optimizer]
) -> None:
    """Rewrite gradients that wait, and what optimizers remember of them, for the factors ``key`` of some layers.

    Running means of gradients and of their squares, as Adam and SGD keep them, are rewritten. Others, such as 8-bit
    moments and Adafactor's, are forgotten for these factors, and the optimizer begins them anew.

    Args:
        factors: of the run.
        key: "A" or "B".
        changes: layer number -> how its rows change.
        optimizers: those that may hold the factors.
    """
    holder, own = factors.holder, factors.numbers(key)
    numbers = [own[n] for n in changes]
    waiting = holder.gradients(numbers)
    holder.write_gradients(_rewritten(factors, key, changes, waiting, "gradient"))
    done: set[int] = set()  # one state can be shared by an optimizer and its copy
    for optimizer in optimizers:
        forget_all_together(optimizer)
        names = holder.state_names(optimizer, numbers)
        states = {name: holder.states(optimizer, name, numbers, done) for name in names}
        with _centered(states):
            for name in names:
                kind = kind_of(optimizer, name, names)
                states[name] = _rewritten(factors, key, changes, states[name], kind)
        for name, values in states.items():
            holder.write_states(optimizer, name, values)


@contextmanager
def _centered(states: dict[str, dict[int, Tensor]]) -> Iterator[None]:
    """Have variances in ``square_avg`` meanwhile, where an optimizer remembers the mean in ``grad_avg``.

    Mean and mean square, each rewritten by itself, could make a negative variance, of which RMSprop takes the root.
    """
    both = "grad_avg" in states and "square_avg" in states
    if both:
        means = states["grad_avg"]
        states["square_avg"] = {n: v - means[n].square() for n, v in states["square_avg"].items()}
    yield
    if both:
        means = states["grad_avg"]
        states["square_avg"] = {n: v + means[n].square() for n, v in states["square_avg"].items()}


def _rewritten(
    factors: Factors, key: str, changes: Mapping[int, BasisChange], held: Mapping[int, Tensor], kind: str
) -> dict[int, Tensor]:
    """Tensors in the shapes of factors, by factor number, rewritten; those of one shape in one product."""

    def change(rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        alike: dict[Any, list[int]] = {}
        for n, own in rows.items():
            alike.setdefault((own.shape, own.device, changes[n].weight.shape), []).append(n)
        changed: dict[int, Tensor] = {}
        for layers in alike.values():
            matrices = torch.cat([changes[n].of(kind) for n in layers])
            stacked = torch.cat([rows[n] for n in layers]).to(matrices)
            new = matrices @ stacked.view(*matrices.shape[:2], -1)
            changed |= zip(layers, new.flatten(0, 1).split(len(stacked) // len(layers)), strict=True)
        return changed

    return factors.rewrite(key, list(changes), held, change)
