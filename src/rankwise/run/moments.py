"""Rewrites pending gradients and optimizers' states in another basis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.parallel.optimizer_state import forget_all_together, kind_of
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
        """The same change, followed by setting all rows to 0 that are not in ``kept``, (n, r, 1), bool."""
        return BasisChange(*(torch.where(kept, each, 0.0) for each in self))

    def scaled(self, by: Tensor) -> BasisChange:
        """The same change, followed by multiplying each block of the factor by ``by``, (n, 1, 1)."""
        return BasisChange(self.weight * by, self.gradient / by)

    def of(self, kind: str) -> Tensor:
        """The matrices for tensors that change like a "weight", a "gradient", or the "square" of a gradient."""
        if kind == "weight":
            return self.weight
        return self.gradient if kind == "gradient" else self.gradient.square()


# For each shape, the layers of that shape and the change of basis of all their blocks, one after the other.
Changes = Sequence[tuple[Sequence[int], BasisChange]]


def rewrite_memory(
    factors: Factors, key: str, layers: Sequence[int], changes: Changes, optimizers: Iterable[Optimizer]
) -> None:
    """Rewrite pending gradients and optimizers' states for the factors ``key`` of some layers.

    Running means of gradients and of their squares, as in Adam and SGD, are rewritten. Other kinds of state, such as
    8-bit moments and Adafactor's, are reset for these factors, and the optimizer starts them again.

    Args:
        factors: the factors of the run.
        key: "A" or "B".
        layers: the indices of the layers to rewrite.
        changes: the changes of basis of these layers, and perhaps of others.
        optimizers: the optimizers that may hold the factors.
    """
    holder, own = factors.holder, factors.numbers(key)
    numbers = [own[n] for n in layers]
    waiting = holder.gradients(numbers)
    holder.write_gradients(_rewritten(factors, key, layers, changes, waiting, "gradient"))
    done: set[int] = set()  # an optimizer and its copy can share one state
    for optimizer in optimizers:
        forget_all_together(optimizer)
        names = holder.state_names(optimizer, numbers)
        states = {name: holder.states(optimizer, name, numbers, done) for name in names}
        with _centered(states):
            for name in names:
                kind = kind_of(optimizer, name, names)
                states[name] = _rewritten(factors, key, layers, changes, states[name], kind)
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
    factors: Factors, key: str, layers: Sequence[int], changes: Changes, held: Mapping[int, Tensor], kind: str
) -> dict[int, Tensor]:
    """Rewrite tensors in the shapes of factors, by factor number. Layers of one shape take one batched product."""

    def change(rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        changed: dict[int, Tensor] = {}
        for alike, change in changes:
            own = [n for n in alike if n in rows]
            if not own:
                continue
            matrices = change.of(kind)
            if len(own) < len(alike):
                parts = zip(alike, matrices.chunk(len(alike)), strict=True)
                matrices = torch.cat([part for n, part in parts if n in rows])
            stacked = torch.stack([rows[n].to(matrices) for n in own])
            new = matrices @ stacked.view(*matrices.shape[:2], -1)
            changed |= zip(own, new.view(stacked.shape).unbind(), strict=True)
        return changed

    return factors.rewrite(key, layers, held, change)
