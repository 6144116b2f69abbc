"""Schedule, scores, allocation and penalty keep their promises over thousands of random cases.

Everything is compared with plain loops in float64 that are written here, and share no code with the library.
"""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import rankwise as rw
from rankwise.method.allocation import allocate
from rankwise.method.layout import TripletLayout
from rankwise.method.penalty import orthogonality_gradients, orthogonality_penalty
from rankwise.method.schedule import nearest_schedule
from rankwise.method.scores import flatten, triplet_scores, update_scores

seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0, 0.95)
# Scores in practice are tiny and often equal; in the worst case they are anything a float can be.
scores = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-30, 1.0, 2.0, math.inf, -math.inf, math.nan]),
    st.floats(width=32),
)


def random_cases(count: int) -> Any:
    return settings(max_examples=count, deadline=None, database=None, derandomize=True)


@st.composite
def schedules(draw: Any, longest: int = 20_000) -> rw.BudgetSchedule:
    total_step = draw(st.integers(1, longest))
    last_allocation = draw(st.integers(1, total_step))
    tinit = draw(st.integers(0, last_allocation - 1))
    return rw.BudgetSchedule(tinit, total_step - last_allocation, total_step, draw(st.integers(1, 50)))


def interesting_steps(schedule: rw.BudgetSchedule, generator: random.Random) -> list[int]:
    """The borders of the phases with their neighbours, and some steps in between and beyond."""
    borders = [0, schedule.tinit, schedule.last_allocation, schedule.total_step, schedule.total_step + 100]
    near = {border + offset for border in borders for offset in (-1, 0, 1)}
    within = {generator.randint(0, schedule.total_step + 100) for _ in range(60)}
    return sorted(step for step in near | within if step >= 0)


# The schedule.


@random_cases(400)
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


@random_cases(400)
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


@random_cases(1000)
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


@random_cases(400)
@given(shares, shares, st.integers(1, 10_000))
def test_fractions_of_the_run_make_a_schedule_or_are_refused(
    warm_up: float, final: float, total_step: int
) -> None:
    try:
        config = rw.AdaLoraConfig(tinit=warm_up, tfinal=final)
        schedule = config.with_total_step(total_step).resolved_schedule()
    except ValueError as refusal:
        short = round(warm_up * total_step) >= total_step - round(final * total_step)
        assert warm_up + final >= 1 or short, refusal
        return
    assert schedule.tinit < schedule.last_allocation
    assert abs(schedule.tinit - warm_up * total_step) <= 0.5
    assert abs(schedule.tfinal - final * total_step) <= 0.5


# The allocation.


def allocate_by_sorting(values: list[float], budget: int, order: list[int]) -> list[bool]:
    lowest_if_nan = [-math.inf if math.isnan(value) else value for value in values]
    place = {triplet: number for number, triplet in enumerate(order)}
    best = sorted(range(len(values)), key=lambda t: (-lowest_if_nan[t], place[t]))[:budget]
    return [triplet in best for triplet in range(len(values))]


@random_cases(1000)
@given(st.lists(scores, min_size=1, max_size=30), shares, seeds)
def test_the_budget_is_met_exactly_by_the_best_whatever_the_scores(
    values: list[float], share: float, seed: int
) -> None:
    budget = round(share / 0.95 * len(values))
    order = random.Random(seed).sample(range(len(values)), len(values))
    kept = allocate(torch.tensor(values), budget, torch.tensor(order))
    assert int(kept.sum()) == budget
    assert kept.tolist() == allocate_by_sorting(torch.tensor(values).tolist(), budget, order)
    assert torch.equal(kept, allocate(torch.tensor(values), budget, torch.tensor(order)))


@random_cases(200)
@given(st.lists(scores, min_size=1, max_size=20))
def test_what_a_smaller_budget_keeps_a_greater_one_keeps_too(values: list[float]) -> None:
    tensor = torch.tensor(values)
    kept = [allocate(tensor, budget) for budget in range(len(values) + 1)]
    for smaller, greater in zip(kept, kept[1:], strict=False):
        assert bool((smaller <= greater).all())


@random_cases(300)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=8), st.floats(0, 1))
def test_equal_scores_share_the_budget_evenly_between_the_layers(ranks: list[int], share: float) -> None:
    layout = TripletLayout(tuple(ranks), (3,) * len(ranks), (2,) * len(ranks))
    budget = round(share * layout.triplets)
    kept = allocate(torch.zeros(layout.triplets), budget, torch.tensor(layout.round_robin()))
    held = [int(part.sum()) for part in kept.split(ranks)]
    full = [rank for rank, initial in zip(held, ranks, strict=True) if rank == initial]
    others = [rank for rank, initial in zip(held, ranks, strict=True) if rank < initial]
    assert sum(held) == budget
    assert not others or (max(others) - min(others) <= 1 and max(full, default=0) <= max(others) + 1)


# The scores.


def random_layout(generator: random.Random) -> TripletLayout:
    """Layers of few different shapes, as models have them, in random order."""
    shapes = [(generator.randint(1, 5), generator.randint(1, 7), generator.randint(1, 7)) for _ in range(3)]
    chosen = [generator.choice(shapes) for _ in range(generator.randint(1, 6))]
    ranks, widths_in, widths_out = zip(*chosen, strict=True)
    return TripletLayout(ranks, widths_in, widths_out)


def random_factors(layout: TripletLayout, scale: float) -> list[Tensor]:
    """All A, then all E, then all B."""
    layers = list(zip(layout.ranks, layout.widths_in, layout.widths_out, strict=True))
    A = [torch.randn(rank, width) for rank, width, _ in layers]
    E = [torch.randn(rank, 1) for rank, _, _ in layers]
    B = [torch.randn(width, rank) for rank, _, width in layers]
    return [scale * matrix for matrix in (*A, *E, *B)]


class ElementByElement:
    """The running averages of the paper's equations 8 to 10, in float64, one element at a time."""

    def __init__(self, factors: list[Tensor], beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity = [[0.0] * matrix.numel() for matrix in factors]
        self.uncertainty = [[0.0] * matrix.numel() for matrix in factors]

    def update(self, factors: list[Tensor], gradients: list[Tensor | None]) -> None:
        given = [gradient for gradient in gradients if gradient is not None]
        if not all(math.isfinite(value) for gradient in given for value in gradient.flatten().tolist()):
            return
        for number, (matrix, gradient) in enumerate(zip(factors, gradients, strict=True)):
            if gradient is None:
                continue
            pairs = zip(matrix.flatten().tolist(), gradient.flatten().tolist(), strict=True)
            for place, (w, g) in enumerate(pairs):
                importance = abs(w * g)
                mean = self.beta1 * self.sensitivity[number][place] + (1 - self.beta1) * importance
                spread = self.uncertainty[number][place]
                self.sensitivity[number][place] = mean
                self.uncertainty[number][place] = self.beta2 * spread + (1 - self.beta2) * abs(
                    importance - mean
                )


@random_cases(150)
@given(seeds, st.floats(0.05, 0.99), st.floats(0.05, 0.99), st.sampled_from([1e-6, 1.0, 1e3]))
def test_the_flat_scores_equal_an_update_element_by_element(
    seed: int, beta1: float, beta2: float, scale: float
) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    layout = random_layout(generator)
    reference = ElementByElement(random_factors(layout, 1.0), beta1, beta2)
    sensitivity, uncertainty = torch.zeros(layout.elements), torch.zeros(layout.elements)
    counted = []
    for _ in range(4):
        factors, gradients = random_factors(layout, scale), random_factors(layout, scale)
        partly: list[Tensor | None] = [None if generator.random() < 0.2 else g for g in gradients]
        broken = generator.random() < 0.2
        for gradient in partly:
            if broken and gradient is not None:
                gradient.view(-1)[0] = generator.choice([math.nan, math.inf, -math.inf])
        known = torch.cat(
            [
                torch.full((matrix.numel(),), gradient is not None)
                for matrix, gradient in zip(factors, partly, strict=True)
            ]
        )
        filled = [g if g is not None else torch.zeros_like(m) for m, g in zip(factors, partly, strict=True)]
        importance = [matrix * gradient for matrix, gradient in zip(factors, filled, strict=True)]
        cpu = torch.device("cpu")
        counted.append(
            bool(update_scores(sensitivity, uncertainty, flatten(importance, cpu), beta1, beta2, known))
        )
        reference.update(factors, partly)
        assert counted[-1] == (not broken or all(gradient is None for gradient in partly))
    for ours, theirs in ((sensitivity, reference.sensitivity), (uncertainty, reference.uncertainty)):
        expected = torch.tensor([value for matrix in theirs for value in matrix], dtype=torch.float64)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6 * scale**2)


@random_cases(200)
@given(seeds)
def test_triplet_scores_equal_a_loop_over_rows_and_columns(seed: int) -> None:
    torch.manual_seed(seed)
    layout = random_layout(random.Random(seed))
    count = len(layout.ranks)
    sensitivity = [matrix.abs() for matrix in random_factors(layout, 1.0)]
    uncertainty = [matrix.abs() for matrix in random_factors(layout, 1.0)]
    element = [(s.double() * u.double()) for s, u in zip(sensitivity, uncertainty, strict=True)]
    A, E, B = element[:count], element[count : 2 * count], element[2 * count :]
    expected = []
    for a, e, b in zip(A, E, B, strict=True):
        for i in range(a.shape[0]):
            row, column = a[i].tolist(), b[:, i].tolist()
            expected.append(float(e[i, 0]) + sum(row) / len(row) + sum(column) / len(column))
    cpu = torch.device("cpu")
    ours = triplet_scores(layout, flatten(sensitivity, cpu), flatten(uncertainty, cpu))
    torch.testing.assert_close(
        ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


# The penalty.


@random_cases(150)
@given(seeds, st.floats(1e-3, 10), st.sampled_from([0.02, 1.0]))
def test_the_penaltys_gradient_is_autograds(seed: int, weight: float, scale: float) -> None:
    torch.manual_seed(seed)
    layout = random_layout(random.Random(seed))
    count = len(layout.ranks)
    factors = [(matrix.double() * scale).requires_grad_() for matrix in random_factors(layout, 1.0)]
    A, B = factors[:count], factors[2 * count :]
    norms = [torch.linalg.matrix_norm(a @ a.T - torch.eye(a.shape[0], dtype=a.dtype)) for a in A]
    norms += [torch.linalg.matrix_norm(b.T @ b - torch.eye(b.shape[1], dtype=b.dtype)) for b in B]
    loss = weight * torch.stack(norms).mean()
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(weight * orthogonality_penalty(A, B), loss)
        for matrices, columns in ((A, False), (B, True)):
            ours = orthogonality_gradients(matrices, columns, weight, count=2 * count)
            for matrix, gradient in zip(matrices, ours, strict=True):
                torch.testing.assert_close(gradient, matrix.grad, rtol=1e-9, atol=1e-12)


def test_the_penaltys_gradient_at_an_orthonormal_matrix_is_zero_and_not_nan() -> None:
    (gradient,) = orthogonality_gradients([torch.eye(3, 5)], False, weight=1.0, count=1)
    assert torch.equal(gradient, torch.zeros(3, 5))


# A whole run: the pure parts connected, in a model that trains.


@st.composite
def runs(draw: Any) -> dict[str, Any]:
    schedule = draw(schedules(longest=12))
    init_r = draw(st.integers(1, 5))
    return {
        "tinit": schedule.tinit,
        "tfinal": schedule.tfinal,
        "total_step": schedule.total_step,
        "deltaT": draw(st.integers(1, 4)),
        "init_r": init_r,
        "target_r": draw(st.integers(1, init_r)),
        "orth_reg_weight": draw(st.sampled_from([0.0, 0.5])),
        "init_lora_weights": draw(st.sampled_from(["gated", True])),
    }


def train(options: dict[str, Any], rate: float, seed: int, extra_steps: int) -> Any:
    """Random data, with now and then a gradient that is NaN, infinite or not there."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 3)]
    model = rw.get_peft_model(
        nn.Sequential(*layers), rw.AdaLoraConfig(target_modules=["0", "2", "3"], **options)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    kept = []
    for _ in range(options["total_step"] + extra_steps):
        before = [parameter.detach().clone() for parameter in trained]
        model(torch.randn(4, 6)).square().mean().backward()
        trouble = generator.random()
        victim = generator.choice(trained)
        if trouble < 0.1 and victim.grad is not None:
            victim.grad.view(-1)[0] = generator.choice([math.nan, math.inf])
        elif trouble < 0.2:
            victim.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if trouble < 0.1:  # as one who watches over a run does
            for parameter, value in zip(trained, before, strict=True):
                parameter.data.copy_(value)
        kept.append(model.rankwise_mask.clone())
    return model, kept


@random_cases(40)
@given(runs(), st.sampled_from([0.0, 1e-3, 0.5]), seeds, st.integers(0, 3))
@pytest.mark.filterwarnings("ignore")
def test_a_run_meets_every_budget_exactly_and_its_last_phase_changes_nothing(
    options: dict[str, Any], rate: float, seed: int, extra_steps: int
) -> None:
    model, kept = train(options, rate, seed, extra_steps)
    schedule = rw.AdaLoraConfig(**options).resolved_schedule()
    initial, target = 3 * options["init_r"], 3 * options["target_r"]
    records = model.rank_history.records
    gated, costs = options["init_lora_weights"] == "gated", (6 + 5, 5 + 4, 4 + 3)
    for record in records:
        assert record.budget == schedule.budget(record.step, initial, target)
        if gated:
            spent = sum(cost * rank for cost, rank in zip(costs, record.ranks, strict=True))
            allowance = record.budget * sum(costs) * options["init_r"] // initial
            assert allowance - max(costs) < spent <= allowance
        else:
            assert sum(record.ranks) == record.budget
    if target < initial:
        last = max(schedule.last_allocation, 1)
        pruning = range(schedule.tinit + 1, last + 1)
        assert [record.step for record in records] == [0] + [s for s in pruning if schedule.allocates(s)]
    for step, mask in enumerate(kept, 1):
        if step >= schedule.last_allocation:
            assert torch.equal(mask, kept[-1])
    state = model.allocation_state
    assert state.budget == target
    assert gated or model.rank_summary().total_rank == target
    assert state.step == options["total_step"] + extra_steps

    again, _ = train(options, rate, seed, extra_steps)
    assert again.rank_history == model.rank_history
    assert torch.equal(again.rankwise_mask, model.rankwise_mask)
