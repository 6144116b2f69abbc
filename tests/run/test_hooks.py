"""Listeners are called before and after every step of the optimizers that they hold, in any training loop."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from rankwise.run.hooks import Closure, listen, stop_listening


class Recorder:
    def __init__(self, optimizer: torch.optim.Optimizer, instead: Closure | None = None) -> None:
        self.optimizer, self.instead, self.heard = optimizer, instead, []

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        return optimizer is self.optimizer

    def before_step(self, optimizer: Any, closure: Closure | None) -> Closure | None:
        self.heard.append(("before", float(weight.detach())))
        return self.instead or closure

    def after_step(self, optimizer: Any) -> None:
        self.heard.append(("after", float(weight.detach())))


weight = torch.nn.Parameter(torch.tensor(5.0, dtype=torch.float64))


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    weight.data.fill_(5.0)
    weight.grad = torch.ones_like(weight)
    return torch.optim.SGD([weight], lr=1.0)


def test_listeners_are_called_before_and_after_the_steps_of_optimizers_that_they_hold(optimizer: Any) -> None:
    mine, other = Recorder(optimizer), Recorder(torch.optim.SGD([weight], lr=1.0))
    listen(mine), listen(other)
    optimizer.step()
    assert mine.heard == [("before", 5.0), ("after", 4.0)] and not other.heard


def test_a_listener_that_stops_listening_is_not_called(optimizer: Any) -> None:
    mine = Recorder(optimizer)
    listen(mine)
    stop_listening(mine)
    stop_listening(mine)  # a second call is allowed
    optimizer.step()
    assert not mine.heard


def test_listening_keeps_no_one_alive(optimizer: Any) -> None:
    mine = Recorder(optimizer)
    heard = mine.heard
    listen(mine)
    del mine
    gc.collect()
    optimizer.step()
    assert not heard


@pytest.mark.parametrize("by_name", [False, True])
def test_the_step_is_taken_with_the_closure_that_a_listener_gives_in_place_of_its_own(
    optimizer: Any, by_name: bool
) -> None:
    mine = Recorder(optimizer, instead=lambda: "the listener's")
    listen(mine)
    given = {"closure": lambda: "its own"} if by_name else {}
    loss = optimizer.step(**given) if by_name else optimizer.step(lambda: "its own")
    assert loss == "the listener's"
    stop_listening(mine)
    assert optimizer.step(lambda: "its own") == "its own"


def test_a_compiled_step_calls_listeners_out_of_the_compilers_sight(optimizer: Any) -> None:
    seen = []

    class Looks(Recorder):
        def after_step(self, optimizer: Any) -> None:
            seen.append(torch.compiler.is_compiling())
            super().after_step(optimizer)

    mine = Looks(optimizer)
    listen(mine)
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert mine.heard == [("before", 5.0), ("after", 4.0)] and seen == [False]
