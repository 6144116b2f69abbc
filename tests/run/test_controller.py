"""The controller connects the parts of the method: its run equals a run by hand, written out in float64."""

from __future__ import annotations

import math
import random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import rankwise as rw
from cases import random_cases, schedules, seeds

STEPS, BETA1, BETA2 = 14, 0.8, 0.6
OPTIONS: dict[str, Any] = {
    "init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 4, "total_step": STEPS, "deltaT": 2, "lora_alpha": 8,
    "beta1": BETA1, "beta2": BETA2, "orth_reg_weight": 0, "target_modules": ["0", "2"],
}  # fmt: skip
WIDTHS = ((6, 9), (9, 3))  # widths of inputs and outputs


def adapted(start: str | bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    return rw.get_peft_model(model, rw.AdaLoraConfig(**OPTIONS, init_lora_weights=start))


def factors(model: Any, key: str) -> list[nn.Parameter]:
    return [getattr(model[place], f"lora_{key}")["default"] for place in (0, 2)]


def acting(model: Any, paper: bool) -> list[list[bool]]:
    """The triplets in use, for each layer: by E in the paper's form; by A and B, which must agree, in the default."""
    if paper:
        return [(E != 0).flatten().tolist() for E in factors(model, "E")]
    rows, columns = ([(p if key == "A" else p.T).any(1) for p in factors(model, key)] for key in "AB")
    assert all(torch.equal(one, other) for one, other in zip(rows, columns, strict=True))
    return [one.tolist() for one in rows]


def scales(model: Any) -> list[float]:
    return [model[place].scaling["default"] for place in (0, 2)]


def scale_by_hand(kept: list[list[bool]], ranks: int | None) -> float:
    """``lora_alpha / k`` for an average rank k, weighted by parameters; with ``ranks`` None, at the target."""
    if ranks is None:
        return OPTIONS["lora_alpha"] / OPTIONS["target_r"]
    costs = [sum(widths) for widths in WIDTHS]
    spent = sum(cost * sum(layer) for cost, layer in zip(costs, kept, strict=True))
    return OPTIONS["lora_alpha"] * sum(costs) / spent


class ByHand:
    """The run's choices in plain loops: by the paper's equations 6 to 11, or by updates and gradients."""

    def __init__(self, paper: bool) -> None:
        self.paper = paper
        self.averages: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.kept = [[True] * 4, [True] * 4]
        self.strengths: list[Tensor] = []
        self.norms = [0.0, 0.0]  # summed over the steps

    def score(self, model: Any, gradients: dict[tuple[str, int], Tensor]) -> None:
        for (key, layer), gradient in gradients.items():
            importance = (factors(model, key)[layer].detach() * gradient).abs()
            before = self.averages.get((key, layer), (torch.zeros_like(importance),) * 2)
            mean = BETA1 * before[0] + (1 - BETA1) * importance
            self.averages[key, layer] = (
                mean,
                BETA2 * before[1] + (1 - BETA2) * (importance - mean).abs(),
            )

    def measure(self, gradients: dict[tuple[str, int], Tensor]) -> None:
        for layer in (0, 1):
            acting = sum(self.kept[layer])
            columns = [float(column.norm()) for column in gradients["B", layer].T]
            if acting:
                self.norms[layer] += math.sqrt(sum(norm**2 for norm in columns) / acting)

    def look(self, model: Any) -> None:
        self.strengths = [
            torch.linalg.svdvals(model[place].delta_weight("default").detach()) for place in (0, 2)
        ]

    def triplet(self, layer: int, number: int) -> float:
        if not self.paper:
            strengths = self.strengths[layer]
            strength = float(strengths[number]) if number < len(strengths) else 0.0
            return math.sqrt(strength * self.norms[layer]) / sum(WIDTHS[layer])
        products = {key: s * u for (key, place), (s, u) in self.averages.items() if place == layer}
        return float(
            products["A"][number].mean() + products["E"][number, 0] + products["B"][:, number].mean()
        )

    def choose(self, budget: int) -> None:
        ranks = [sum(layer) for layer in self.kept]
        places = [(layer, number) for layer in (0, 1) for number in range(4 if self.paper else ranks[layer])]
        left = budget if self.paper else budget * sum(4 * sum(widths) for widths in WIDTHS) // 8
        self.kept = [[False] * 4, [False] * 4]
        for layer, number in sorted(places, key=lambda place: -self.triplet(*place)):
            cost = 1 if self.paper else sum(WIDTHS[layer])
            if cost <= left:
                left -= cost
                self.kept[layer][number] = True


@pytest.mark.parametrize("start", ["principal", True, False])
def test_a_run_scores_allocates_and_fixes_as_by_hand(start: str | bool) -> None:
    model, hand = adapted(start), ByHand(start != "principal")
    schedule = rw.AdaLoraConfig(**OPTIONS).resolved_schedule()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    optimizer.register_step_post_hook(lambda *_: hand.look(model))  # called before the controller acts
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        (model(inputs) - inputs[:, :3] * inputs[:, 3:]).square().mean().backward()
        gradients = {
            (key, layer): factor.grad.clone()
            for key in ("AEB" if hand.paper else "AB")
            for layer, factor in enumerate(factors(model, key))
            if factor.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
        if hand.paper and step <= schedule.last_allocation:
            hand.score(model, gradients)
        elif not hand.paper:
            hand.measure(gradients)
        if schedule.allocates(step):
            hand.choose(schedule.budget(step, 8, 4))
            assert acting(model, hand.paper) == hand.kept, f"step {step}"
            if not hand.paper:
                ranks = None if step == schedule.last_allocation else sum(map(sum, hand.kept))
                assert scales(model) == pytest.approx([scale_by_hand(hand.kept, ranks)] * 2), f"step {step}"
    assert model.rank_history.records[-1].ranks == [sum(layer) for layer in hand.kept]
    assert model.allocation_state.reached_target
    assert sum(map(sum, hand.kept)) < 8


def test_a_pruned_rank_grows_back_in_the_papers_form_only() -> None:
    for start, grows in ((True, True), ("principal", False)):
        model = adapted(start)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        closed_before, grown = None, False
        for _ in range(10):
            model(torch.randn(8, 6, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            closed = ~torch.tensor(acting(model, paper=start is True)).flatten()
            if closed_before is not None:
                grown |= bool((closed_before & ~closed).any())
            closed_before = closed
        assert closed_before is not None and grown == grows


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
        "init_lora_weights": draw(st.sampled_from(["principal", True])),
    }


def train(options: dict[str, Any], rate: float, seed: int, extra_steps: int) -> Any:
    """Train on random data. Some gradients are NaN, infinite or missing."""
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
        if trouble < 0.1:  # as a person who watches over a run may do
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
    ours, costs = options["init_lora_weights"] == "principal", (6 + 5, 5 + 4, 4 + 3)
    for record in records:
        assert record.budget == schedule.budget(record.step, initial, target)
        if ours:
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
    assert ours or model.rank_summary().total_rank == target
    assert state.step == options["total_step"] + extra_steps

    again, _ = train(options, rate, seed, extra_steps)
    assert again.rank_history == model.rank_history
    assert torch.equal(again.rankwise_mask, model.rankwise_mask)
