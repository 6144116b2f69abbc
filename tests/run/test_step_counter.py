"""The steps of several optimizers that count as steps of the run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD, Optimizer

from rankwise.run.step_counter import StepCounter


def sgd() -> SGD:
    return SGD([torch.zeros(1)])


def counted(
    counter: StepCounter,
    steps: list[tuple[Optimizer, list[int]]],
    trains: Callable[[int], bool] = lambda number: True,
) -> list[bool]:
    found = []
    for optimizer, holds in steps:
        assert counter.begin(optimizer)
        found.append(counter.end(optimizer, holds, trains))
    return found


def test_every_step_of_the_only_optimizer_counts() -> None:
    assert counted(StepCounter(), [(sgd(), [0, 1, 2])] * 3) == [True] * 3


@pytest.mark.parametrize("parts", [2, 3])
def test_one_of_several_optimizers_that_share_the_parameters_counts_each_iteration(parts: int) -> None:
    optimizers = [(sgd(), [number]) for number in range(parts)]
    assert counted(StepCounter(), optimizers * 4) == [True, *[False] * (parts - 1)] * 4


def test_the_lead_passes_to_the_optimizer_with_an_earlier_parameter_without_counting_twice() -> None:
    late, early = (sgd(), [1]), (sgd(), [0])
    assert counted(StepCounter(), [late, early, late, early, late]) == [True, False, False, True, False]


def test_an_optimizer_with_nothing_that_trains_counts_nothing_and_does_not_lead() -> None:
    counter = StepCounter()
    head, adapter = (sgd(), []), (sgd(), [0])
    assert counted(counter, [head, adapter, head, adapter]) == [False, True, False, True]
    assert counter.leader == 0


def test_when_the_leaders_parameter_is_frozen_another_leads() -> None:
    counter = StepCounter()
    first, second = (sgd(), [0]), (sgd(), [1])
    assert counted(counter, [first, second]) == [True, False]
    assert counted(counter, [first, second] * 2, trains=lambda number: number != 0) == [False, True] * 2


def test_an_optimizer_that_steps_twice_while_the_leader_does_not_leads_from_then_on() -> None:
    counter = StepCounter()
    leader, other = (sgd(), [0]), (sgd(), [1])
    assert counted(counter, [leader, other, other, other]) == [True, False, True, True]
    assert counter.leader == 1


def test_a_run_that_goes_on_knows_its_leader() -> None:
    first, second = (sgd(), [0]), (sgd(), [3])
    assert counted(StepCounter(leader=0), [second, first, second, first]) == [False, True, False, True]


@pytest.mark.parametrize("in_a_list", [False, True])
def test_an_optimizer_inside_another_counts_no_step_of_its_own(in_a_list: bool) -> None:
    inner, outer, counter = sgd(), sgd(), StepCounter()
    outer.held = [inner] if in_a_list else inner  # type: ignore[attr-defined]
    assert counter.begin(outer)
    assert not counter.begin(inner)
    assert not counter.end(inner, [0], lambda number: True)
    assert counter.end(outer, [0], lambda number: True)
