"""Calls listeners back around every step of every optimizer.

PyTorch offers hooks around every ``Optimizer.step``. A listener therefore acts in any training loop, once per optimizer
step: under gradient accumulation, under a GradScaler that skips steps, and in trainers that do not know rankwise.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from rankwise.parallel.sharded import only_makes_state, put_back

Closure = Callable[[], Any]


class Listener(Protocol):
    """An object that is called back around optimizer steps."""

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether the listener wants to know of this optimizer's steps."""

    def before_step(self, optimizer: Optimizer, closure: Closure | None) -> Closure | None:
        """Called before the optimizer steps. Returns the closure to step with, or None if there is none."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after the optimizer has stepped. The gradients are still there."""


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()  # of Listener


def listen(listener: Listener) -> None:
    """Call ``listener`` back from now on, as long as it exists."""
    _register()
    _listeners.add(listener)


def stop_listening(listener: Listener) -> None:
    """Stop calling ``listener`` back."""
    _listeners.discard(listener)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    positional = len(args) > 1 and callable(args[1])
    closure = given = args[1] if positional else kwargs.get("closure")
    if _listeners:
        put_back()
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


@functools.cache
def _register() -> None:
    """Register the hooks, so that ``torch.compile`` of a step does not compile the listeners.

    This is done late, because it imports the compiler. Every optimizer does so, too, when it is made.
    """
    register_optimizer_step_pre_hook(torch.compiler.disable(_before))
    register_optimizer_step_post_hook(torch.compiler.disable(_after))
