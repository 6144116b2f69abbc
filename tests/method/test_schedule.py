"""The budget schedule: its invariants, and PEFT's numbers."""

from __future__ import annotations

import random
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rankwise as rw
from cases import random_cases, schedules, seeds
from rankwise.method.schedule import BudgetSchedule, Phase, check_length, nearest_schedule

anytime = settings(deadline=None)  # a test may be slow on a busy machine
shares = st.floats(0, 0.95)


def interesting_steps(schedule: rw.BudgetSchedule, generator: random.Random) -> list[int]:
    """The first and last steps of the phases, their neighbours, and some steps in between and beyond."""
    borders = [0, schedule.tinit, schedule.last_allocation, schedule.total_step, schedule.total_step + 100]
    near = {border + offset for border in borders for offset in (-1, 0, 1)}
    within = {generator.randint(0, schedule.total_step + 100) for _ in range(60)}
    return sorted(step for step in near | within if step >= 0)


budgets = st.integers(0, 3000).flatmap(lambda target: st.tuples(st.integers(target, 3000), st.just(target)))


@anytime
@given(schedules(longest=500), budgets)
def test_nothing_is_pruned_in_warm_up_and_the_last_phase_is_constant(
    schedule: BudgetSchedule, budget: tuple[int, int]
) -> None:
    initial, target = budget
    for step in range(1, schedule.tinit + 1):
        assert schedule.phase(step) is Phase.WARMUP
        assert schedule.budget(step, initial, target) == initial
        assert not schedule.allocates(step)
    for step in range(schedule.last_allocation + 1, schedule.total_step + 10):
        assert schedule.phase(step) is Phase.FINAL
        assert schedule.budget(step, initial, target) == target
        assert not schedule.allocates(step)


@anytime
@given(schedules(longest=500), budgets)
def test_the_last_pruning_step_always_allocates_and_meets_the_target(
    schedule: BudgetSchedule, budget: tuple[int, int]
) -> None:
    assert schedule.phase(schedule.last_allocation) is Phase.PRUNING
    assert schedule.allocates(schedule.last_allocation)
    assert schedule.budget(schedule.last_allocation, *budget) == budget[1]


@anytime
@given(schedules(longest=500))
def test_between_two_allocations_lie_at_most_delta_steps(schedule: BudgetSchedule) -> None:
    chosen = [step for step in range(1, schedule.total_step + 1) if schedule.allocates(step)]
    assert all(after - before <= schedule.deltaT for before, after in zip(chosen, chosen[1:], strict=False))
    assert chosen[-1] == schedule.last_allocation


@anytime
@given(schedules(longest=500), budgets)
def test_budgets_and_allocation_steps_are_those_of_peft(
    schedule: BudgetSchedule, budget: tuple[int, int]
) -> None:
    adalora = pytest.importorskip("peft.tuners.adalora.layer")
    allocator = object.__new__(adalora.RankAllocator)
    allocator.init_bgt, allocator.target_bgt = budget
    allocator.peft_config = SimpleNamespace(
        tinit=schedule.tinit, tfinal=schedule.tfinal, total_step=schedule.total_step, deltaT=schedule.deltaT
    )
    for step in range(1, schedule.total_step + 1):
        expected, mask = allocator.budget_schedule(step)
        assert schedule.budget(step, *budget) == expected
        if (
            step < schedule.last_allocation
        ):  # PEFT always allocates at this step, and later only applies the masks
            assert schedule.allocates(step) == mask


@anytime
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 5000))
def test_phases_that_overlap_are_refused_with_a_schedule_that_works(
    tinit: int, tfinal: int, total_step: int
) -> None:
    assume(tinit >= total_step - tfinal)
    with pytest.raises(ValueError, match=f"tinit={tinit} must be less than") as caught:
        BudgetSchedule(tinit, tfinal, total_step)
    nearest = nearest_schedule(tinit, tfinal, total_step)
    assert nearest is not None
    BudgetSchedule(*nearest, total_step)
    assert f"tinit={nearest[0]}, tfinal={nearest[1]}" in str(caught.value)


@anytime
@given(st.floats(0, 0.49), st.floats(0, 0.49), st.integers(100, 100_000))
def test_fractions_become_steps_of_the_run(tinit: float, tfinal: float, total_step: int) -> None:
    schedule = BudgetSchedule.resolve(tinit, tfinal, total_step)
    assert abs(schedule.tinit - tinit * total_step) <= 0.5
    assert abs(schedule.tfinal - tfinal * total_step) <= 0.5


def test_the_whisper_run_that_started_the_project_is_refused_and_works_when_corrected() -> None:
    with pytest.raises(ValueError, match=r"tinit=6000 .* 13500 - 11000 = 2500"):
        BudgetSchedule(tinit=6000, tfinal=11000, total_step=13500)
    BudgetSchedule(tinit=2000, tfinal=10000, total_step=13500)


@pytest.mark.parametrize("name", ["tinit", "tfinal", "total_step", "deltaT"])
@pytest.mark.parametrize("value", [True, 1.5, "3", None, -1])
def test_values_that_are_not_steps_are_refused_by_name(name: str, value: object) -> None:
    values = {"tinit": 0, "tfinal": 0, "total_step": 10, "deltaT": 1, name: value}
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        BudgetSchedule(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), float("inf"), True, "0.1", None, -3])
def test_lengths_that_are_neither_steps_nor_fractions_are_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError), match="`tfinal`"):
        check_length("tfinal", value)  # type: ignore[arg-type]


@random_cases(200)
@given(schedules(), st.integers(0, 10**6), st.integers(0, 10**6), seeds)
def test_the_budget_falls_from_initial_to_target_and_never_rises(
    schedule: rw.BudgetSchedule, one: int, other: int, seed: int
) -> None:
    target, initial = sorted((one, other))
    steps = interesting_steps(schedule, random.Random(seed))
    budgets = [schedule.budget(step, initial, target) for step in steps]
    assert budgets == sorted(budgets, reverse=True)
    for step, budget in zip(steps, budgets, strict=True):
        if step <= schedule.tinit:
            assert budget == initial
        elif step >= schedule.last_allocation:
            assert budget == target
        else:
            length = schedule.last_allocation - schedule.tinit
            exact = target + (initial - target) * (1 - Fraction(step - schedule.tinit, length)) ** 3
            assert target <= budget <= initial
            assert abs(budget - exact) <= 1 + 1e-6


@random_cases(200)
@given(schedules(), seeds)
def test_phases_follow_each_other_and_ranks_move_in_the_pruning_phase_only(
    schedule: rw.BudgetSchedule, seed: int
) -> None:
    steps = [step for step in interesting_steps(schedule, random.Random(seed)) if step > 0]
    order = [list(rw.Phase).index(schedule.phase(step)) for step in steps]
    assert order == sorted(order)
    assert schedule.allocates(schedule.last_allocation)
    for step in steps:
        if schedule.allocates(step):
            assert schedule.phase(step) is rw.Phase.PRUNING
            assert step == schedule.last_allocation or step % schedule.deltaT == 0


@random_cases(300)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 500))
def test_three_numbers_make_a_schedule_or_are_refused_with_one_that_works(
    tinit: int, tfinal: int, total_step: int
) -> None:
    options = {"tinit": tinit, "tfinal": tfinal, "total_step": total_step}
    if tinit < total_step - tfinal:
        assert rw.AdaLoraConfig(**options).resolved_schedule().last_allocation > tinit
        return
    with pytest.raises(ValueError, match="leaves no step for pruning") as refusal:
        rw.AdaLoraConfig(**options)
    assert f"tinit={tinit} must be less than total_step - tfinal = {total_step} - {tfinal}" in str(
        refusal.value
    )
    nearest = nearest_schedule(tinit, tfinal, total_step)
    if nearest is not None:
        rw.AdaLoraConfig(tinit=nearest[0], tfinal=nearest[1], total_step=total_step)
        assert f"tinit={nearest[0]}, tfinal={nearest[1]}" in str(refusal.value)


@random_cases(200)
@given(shares, shares, st.integers(1, 10_000))
def test_fractions_of_the_run_make_a_schedule_or_are_refused(
    warm_up: float, final: float, total_step: int
) -> None:
    try:
        config = rw.AdaLoraConfig(tinit=warm_up, tfinal=final)
        schedule = config.with_total_step(total_step).resolved_schedule()
    except ValueError as refusal:
        assert warm_up + final >= 1, refusal
        return
    assert schedule.tinit < schedule.last_allocation
    rounded = round(warm_up * total_step), round(final * total_step)
    shorter = rounded[0] - schedule.tinit, rounded[1] - schedule.tfinal
    assert sorted(shorter) == ([0, 1] if sum(rounded) >= total_step else [0, 0])


LEFT_OUT = None


def lengths(total: int) -> list[int | float | None]:
    """The possible settings of a phase: none, a number of steps, a fraction."""
    return [
        LEFT_OUT,
        *sorted({0, 1, total // 2, total - 1} & {*range(total)}),
        *(n / 20 for n in range(0, 20, 3)),
    ]


@pytest.mark.parametrize("form", ["principal", True])
@pytest.mark.parametrize("total", range(1, 31))
def test_phases_fit_every_run_in_which_the_given_settings_leave_room(total: int, form: Any) -> None:
    for tinit in lengths(total):
        for tfinal in lengths(total):
            asked = sum(
                Fraction(0)
                if length is None
                else Fraction(length, total)
                if isinstance(length, int)
                else Fraction(str(length))
                for length in (tinit, tfinal)
            )
            if asked >= 1:
                continue
            given = {"tinit": tinit, "tfinal": tfinal}
            given = {name: length for name, length in given.items() if length is not LEFT_OUT}
            schedule = rw.AdaLoraConfig(total_step=total, init_lora_weights=form, **given).resolved_schedule()
            assert schedule.tinit + schedule.tfinal < total == schedule.total_step
            for name, length in given.items():
                if isinstance(length, int):
                    assert getattr(schedule, name) == length
                else:
                    assert abs(getattr(schedule, name) - length * total) <= (1.5 if len(given) == 2 else 1)
            assert schedule.allocates(schedule.last_allocation)


@pytest.mark.parametrize(("tinit", "tfinal"), [(3, None), (None, 3), (2, 1), (4, 0.1), (0.1, 3), (0.5, 0.5)])
def test_settings_that_leave_no_room_are_refused(tinit: Any, tfinal: Any) -> None:
    with pytest.raises(ValueError, match="no step for pruning"):
        rw.AdaLoraConfig(total_step=3, tinit=tinit, tfinal=tfinal)


@pytest.mark.parametrize("total", [1, 2, 3, 7])
@pytest.mark.parametrize("form", ["principal", True])
def test_a_short_run_meets_its_budget(total: int, form: Any) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    config = rw.AdaLoraConfig(
        init_r=4, target_r=2, total_step=total, target_modules=["0", "1"], init_lora_weights=form
    )
    model: Any = rw.get_peft_model(layers, config)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    for _ in range(total):
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.allocation_state.step == total
    assert model.rank_summary().total_rank == 4
