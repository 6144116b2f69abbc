"""Which steps of which optimizer are steps of the run.

Mostly one optimizer holds the whole adapter, and each of its steps counts. There may be more of them: one for
the A and one for the B, one that shards its parameters and steps an optimizer of its own, one that a script has
thrown away and built anew. The run moves on by one step when the optimizer steps that holds the *leader*: the
first trainable of all E, then A, then B, that any of them holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch.optim import Optimizer


class Turns:
    """Follows the steps of all optimizers that hold some of an adapter's parameters.

    Parameters are known by their number in the order of preference: all E, then all A, then all B.

    Args:
        leader: the leader so far, if the run goes on from a checkpoint.

    Example:
        >>> import torch
        >>> first, second = (torch.optim.SGD([torch.zeros(1)]) for _ in range(2))
        >>> turns, counted = Turns(), []
        >>> for optimizer, holds in [(first, [2, 3]), (second, [0, 1])] * 3:
        ...     _ = turns.begin(optimizer)
        ...     counted.append(turns.end(optimizer, holds, trains=lambda number: True))
        >>> counted  # three iterations, each counted once: from the second on by the one that holds 0
        [True, False, False, True, False, True]
    """

    def __init__(self, leader: int | None = None) -> None:
        self._stepping: weakref.ref[Optimizer] | None = None
        self.leader = leader
        self._waiting: set[int] = set()  # optimizers without the leader, that have stepped since it did

    def begin(self, optimizer: Optimizer) -> bool:
        """``optimizer`` is about to step. False if a wrapper that holds it is: then the wrapper's step is the one."""
        outer = self._stepping() if self._stepping else None
        if outer is None or not _holds(outer, optimizer):
            self._stepping = weakref.ref(optimizer)
            return True
        return False

    def end(self, optimizer: Optimizer, holds: Sequence[int], trains: Callable[[int], bool]) -> bool:
        """Whether the step that ``optimizer`` has taken counts.

        Args:
            optimizer: the one that has stepped.
            holds: the numbers of the parameters that it holds, rising.
            trains: whether the parameter of a number is to be trained now.
        """
        if self._stepping is None or self._stepping() is not optimizer:
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
            # One that steps twice meanwhile leads from now on. One that holds an earlier parameter leads, too,
            # but the old leader has had its turn in this iteration.
            counts = first >= self.leader or self.leader in holds
        self.leader = first
        self._waiting.clear()
        return counts


def _holds(wrapper: Optimizer, optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` is an attribute of ``wrapper``, or in a list that is."""
    for value in vars(wrapper).values():
        if any(each is optimizer for each in (value if isinstance(value, (list, tuple)) else (value,))):
            return True
    return False
