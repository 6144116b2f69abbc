"""Rewrites pending gradients and optimizers' states in another basis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.parallel.optimizer_state import kind_of
from rankwise.run.factors import Factors


class BasisChange(NamedTuple):
    """The change of basis of one factor with n blocks: each block becomes ``weight @ rows``.

    Args:
        weight: (n, r, r), the matrices that multiply the factor.
        gradient: (n, r, r), the matrices that multiply its gradients: the transposed inverses of ``weight``.
    """

    weight: Tensor
    gradient: Tensor

    def cut(self, kept: Tensor) -> BasisChange:
        """The same change, followed by setting all rows to 0 that are not in ``kept``, (n r, 1), bool."""
        blocks, rank = self.weight.shape[:2]
        rows = kept.to(self.weight.device).view(blocks, rank, 1)
        return BasisChange(*(torch.where(rows, each, torch.zeros_like(each)) for each in self))

    def scaled(self, by: float) -> BasisChange:
        """The same change, followed by multiplying the factor by ``by``."""
        return self if by == 1 else BasisChange(self.weight * by, self.gradient / by)

    def of(self, kind: str) -> Tensor:
        """The matrices for tensors that change like a "weight", a "gradient", or the "square" of a gradient."""
        if kind == "weight":
            return self.weight
        return self.gradient if kind == "gradient" else self.gradient.square()


def rewrite_memory(
    factors: Factors, key: str, changes: Mapping[int, BasisChange], optimizers: Iterable[Optimizer]
) -> None:
    """Rewrite pending gradients and optimizers' states for the factors ``key`` of some layers.

    Running means of gradients and of their squares, as in Adam and SGD, are rewritten. Other kinds of state, such as
    8-bit moments and Adafactor's, are reset for these factors, and the optimizer starts them again.

    Args:
        factors: the factors of the run.
        key: "A" or "B".
        changes: the change of basis, by layer index.
        optimizers: the optimizers that may hold the factors.
    """
    holder, own = factors.holder, factors.numbers(key)
    numbers = [own[n] for n in changes]
    waiting = holder.gradients(numbers)
    holder.write_gradients(_rewritten(factors, key, changes, waiting, "gradient"))
    done: set[int] = set()  # an optimizer and its copy can share one state
    for optimizer in optimizers:
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
    """Hold variances in ``square_avg`` inside the context, if the optimizer also keeps the mean in ``grad_avg``.

    If mean and mean square were rewritten separately, the variance could become negative, and RMSprop takes its root.
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
    """Rewrite tensors in the shapes of factors, by factor number. Tensors of one shape take one batched product."""

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
