"""Decides which optimizer steps are steps of the run.

Usually one optimizer holds the whole adapter, and each of its steps counts. There may be more optimizers: one for all A
and one for all B, a wrapper that steps an optimizer of its own, or a new optimizer that a script built to replace an
old one. The run advances by one step when the optimizer that holds the *leader* steps. The leader is the trainable
factor with the lowest number that any of the optimizers holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch.optim import Optimizer


class StepCounter:
    """Follows the steps of all optimizers that hold factors of an adapter.

    Args:
        leader: the leader's number, if the run continues from a checkpoint.

    Example:
        >>> import torch
        >>> first, second = (torch.optim.SGD([torch.zeros(1)]) for _ in range(2))
        >>> counter, counted = StepCounter(), []
        >>> for optimizer, holds in [(first, [2, 3]), (second, [0, 1])] * 3:
        ...     _ = counter.begin(optimizer)
        ...     counted.append(counter.end(optimizer, holds, trains=lambda number: True))
        >>> counted  # each iteration counts once; from the second on, when the optimizer that holds 0 steps
        [True, False, False, True, False, True]
    """

    def __init__(self, leader: int | None = None) -> None:
        self._stepping: weakref.ref[Optimizer] | None = None
        self.leader = leader
        self._waiting: set[int] = set()  # ids of other optimizers that have stepped since the leader's

    def begin(self, optimizer: Optimizer) -> bool:
        """Note that ``optimizer`` begins a step. Return False if a wrapper that holds it is stepping already."""
        outer = self._stepping() if self._stepping else None
        if outer is None or not _holds(outer, optimizer):
            self._stepping = weakref.ref(optimizer)
            return True
        return False

    def is_stepping(self, optimizer: Optimizer) -> bool:
        """Whether the step that is under way is that of ``optimizer`` itself."""
        return self._stepping is not None and self._stepping() is optimizer

    def end(self, optimizer: Optimizer, holds: Sequence[int], trains: Callable[[int], bool]) -> bool:
        """Note that ``optimizer`` has stepped, and return whether the step counts.

        Args:
            optimizer: the optimizer that has stepped.
            holds: the numbers of the factors that it holds, in ascending order.
            trains: a function from a factor's number to whether it trains now.
        """
        if not self.is_stepping(optimizer):
            return False
        self._stepping = None
        first = next((number for number in holds if trains(number)), None)
        if first is None:
            return False
        counts = True
        if self.leader is not None and trains(self.leader):
            if first > self.leader and id(optimizer) not in self._waiting:
                self._waiting.add(id(optimizer))
                return False
            # An optimizer that has stepped twice without the leader's takes the lead. So does one that holds an earlier
            # factor, but in that case the old leader has already counted this iteration.
            counts = first >= self.leader or self.leader in holds
        self.leader = first
        self._waiting.clear()
        return counts


def _holds(wrapper: Optimizer, optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` is an attribute of ``wrapper``, or in a list or tuple that is one."""
    for value in vars(wrapper).values():
        if any(each is optimizer for each in (value if isinstance(value, (list, tuple)) else (value,))):
            return True
    return False
