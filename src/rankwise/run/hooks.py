"""Calls back, around every step of every optimizer, whoever listens.

PyTorch calls a program back around every ``Optimizer.step``. So what listens acts in any training loop, once per
optimizer step: under gradient accumulation, under a GradScaler that skips steps, and in trainers that know nothing
of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from rankwise.parallel.sharded import only_makes_state

Closure = Callable[[], Any]


class Listener(Protocol):
    """What is called back."""

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether the steps of this optimizer matter."""

    def before_step(self, optimizer: Optimizer, closure: Closure | None) -> Closure | None:
        """It is about to step. Returns the closure to step with, if there is one."""

    def after_step(self, optimizer: Optimizer) -> None:
        """It has stepped; gradients are still there."""


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()  # of Listener


def listen(listener: Listener) -> None:
    """Call ``listener`` back from now on, for as long as it lives."""
    _listeners.add(listener)


def stop_listening(listener: Listener) -> None:
    """Call ``listener`` back no more."""
    _listeners.discard(listener)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    positional = len(args) > 1 and callable(args[1])
    closure = given = args[1] if positional else kwargs.get("closure")
    for listener in list(_listeners):
        if listener.holds(optimizer) and not only_makes_state():
            closure = listener.before_step(optimizer, closure)
    if closure is given:
        return None
    if positional:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in list(_listeners):
        if listener.holds(optimizer):
            listener.after_step(optimizer)


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)
