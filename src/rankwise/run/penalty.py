"""Adds the gradient of the orthogonality penalty to a step's gradients.

The penalty therefore needs no place in the loss, and works however the model is wrapped, called or checkpointed.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.adapters.branch import WithoutAutocast
from rankwise.method.penalty import (
    in_blocks,
    orthogonality_gradients,
    orthogonality_penalty,
    out_of_blocks,
)
from rankwise.parallel.holder import Step
from rankwise.run.factors import Factors
from rankwise.run.hooks import Closure

_PENALIZED = (("A", False), ("B", True))  # a factor, and whether its columns count ranks


class AddedPenalty:
    """The penalty of one adapter.

    Args:
        factors: the factors of the run.
        weight: the penalty's weight in the loss; 0 adds nothing.
    """

    def __init__(self, factors: Factors, weight: float) -> None:
        self._factors, self._weight, self._blocks = factors, weight, factors.layout.block_counts
        # The first gradient that the penalty was added to, and that gradient's version afterwards.
        self._added_to: tuple[weakref.ref[Tensor], int] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_added_to": None}

    def refuse_unfit(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that can't be combined with the penalty.

        Raises:
            ValueError: the optimizer is LBFGS.
        """
        if self._weight and isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS compares values of the loss within a step, and the orthogonality penalty is in no loss: "
                f"set `orth_reg_weight=0` (it is {self._weight}), or use another optimizer."
            )

    def add_before(self, step: Step, optimizer: Optimizer, closure: Closure | None) -> Closure | None:
        """Add the penalty's gradient now, or after each call of ``closure``, which computes gradients.

        Returns:
            The closure to step with; None if there was none.
        """
        if closure is None or not self._weight:
            self.add(step, optimizer)
            return closure

        def penalized() -> Any:
            loss = closure()
            self.add(step, optimizer)
            return loss

        return penalized

    @torch.no_grad()
    def add(self, step: Step, optimizer: Optimizer) -> None:
        """Add the penalty's gradient to every A and B that ``optimizer`` steps and that has a gradient.

        If an optimizer steps inside another's step, the gradient is added only once.
        """
        if not self._weight:
            return
        of_E = self._factors.numbers("E") if "E" in self._factors.keys else ()
        stepped = [n for n in step.numbers if n not in of_E]
        numbers = [n for n, has in zip(stepped, step.has_gradients(stepped), strict=True) if has]
        first = self._factors.parameter(numbers[0]).grad if numbers else None
        if not numbers or (first is not None and self._holds_it(first)):
            return
        version = None if first is None else first._version
        weight = self._weight
        if any(group.get("maximize") for group in optimizer.param_groups):
            weight = -weight
        for key, columns in _PENALIZED:
            of_key = self._factors.numbers(key)
            own = [number for number in numbers if number in of_key]
            counts = [self._blocks[of_key.index(number)] for number in own]
            parts = in_blocks(step.values(own), counts, columns)
            with WithoutAutocast(self._factors.mask):
                gradients = orthogonality_gradients(parts, columns, weight, 2 * sum(self._blocks))
            if own:
                step.add_to_gradients(dict(zip(own, out_of_blocks(gradients, counts, columns), strict=True)))
        self._added_to = None
        if first is not None and version is not None and first._version > version:
            self._added_to = (weakref.ref(first), first._version)

    def value(self) -> Tensor:
        """The current penalty without its weight, a 0-dim tensor."""
        A, B = (
            in_blocks(self._factors.holder.whole(list(self._factors.numbers(key))), self._blocks, columns)
            for key, columns in _PENALIZED
        )
        with WithoutAutocast(self._factors.mask):
            return orthogonality_penalty(A, B)

    def _holds_it(self, gradient: Tensor) -> bool:
        """Whether the penalty is in the gradient already: nothing has changed since it was added."""
        if self._added_to is None:
            return False
        known, version = self._added_to
        return known() is gradient and gradient._version == version
