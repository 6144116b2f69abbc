"""The controller connects the parts of the method: a run by it is a run by hand, written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw

STEPS, BETA1, BETA2 = 14, 0.8, 0.6
OPTIONS: dict[str, Any] = {
    "init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 4, "total_step": STEPS, "deltaT": 2, "lora_alpha": 8,
    "beta1": BETA1, "beta2": BETA2, "orth_reg_weight": 0, "target_modules": ["0", "2"],
}  # fmt: skip
WIDTHS = ((6, 9), (9, 3))  # inputs and outputs


def adapted(start: str | bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    return rw.get_peft_model(model, rw.AdaLoraConfig(**OPTIONS, init_lora_weights=start))


def factors(model: Any, key: str) -> list[nn.Parameter]:
    return [getattr(model[place], f"lora_{key}")["default"] for place in (0, 2)]


class ByHand:
    """Scores and choices of the run, from equations 6 to 11 of the paper or those of gates, in plain loops."""

    def __init__(self, gated: bool) -> None:
        self.gated = gated
        self.averages: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.kept = [[True] * 4, [True] * 4]

    def score(self, model: Any, gradients: dict[tuple[str, int], Tensor]) -> None:
        for (key, layer), gradient in gradients.items():
            if self.gated and key != "B":
                continue
            product = factors(model, key)[layer].detach() * gradient
            importance = (product.sum(0) if self.gated else product).abs()
            before = self.averages.get((key, layer), (torch.zeros_like(importance),) * 2)
            mean = BETA1 * before[0] + (1 - BETA1) * importance
            self.averages[key, layer] = (
                mean,
                BETA2 * before[1] + (1 - BETA2) * (importance - mean).abs(),
            )

    def triplet(self, layer: int, number: int) -> float:
        products = {key: s * u for (key, place), (s, u) in self.averages.items() if place == layer}
        if self.gated:
            return float(products["B"][number].sqrt()) / sum(WIDTHS[layer])
        return float(
            products["A"][number].mean() + products["E"][number, 0] + products["B"][:, number].mean()
        )

    def choose(self, budget: int) -> None:
        places = [(layer, number) for layer in (0, 1) for number in range(4)]
        if self.gated:
            places = [(layer, number) for layer, number in places if self.kept[layer][number]]
        left = budget * sum(4 * sum(widths) for widths in WIDTHS) // 8 if self.gated else budget
        self.kept = [[False] * 4, [False] * 4]
        for layer, number in sorted(places, key=lambda place: -self.triplet(*place)):
            left -= sum(WIDTHS[layer]) if self.gated else 1
            if left < 0:
                break
            self.kept[layer][number] = True


@pytest.mark.parametrize("start", ["gated", True, False])
def test_a_run_scores_allocates_and_fixes_as_by_hand(start: str | bool) -> None:
    model, hand = adapted(start), ByHand(start == "gated")
    schedule = rw.AdaLoraConfig(**OPTIONS).resolved_schedule()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        (model(inputs) - inputs[:, :3] * inputs[:, 3:]).square().mean().backward()
        gradients = {
            (key, layer): factor.grad.clone()
            for key in "AEB"
            for layer, factor in enumerate(factors(model, key))
            if factor.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
        if step <= schedule.last_allocation:
            hand.score(model, gradients)
        if schedule.allocates(step):
            hand.choose(schedule.budget(step, 8, 4))
            closed = [(E == 0).flatten().tolist() for E in factors(model, "E")]
            assert closed == [[not stays for stays in layer] for layer in hand.kept], f"step {step}"
    assert model.rank_history.records[-1].ranks == [sum(layer) for layer in hand.kept]
    assert model.allocation_state.reached_target
    assert sum(map(sum, hand.kept)) < 8


def test_a_pruned_rank_grows_back_in_the_papers_form_only() -> None:
    for start, grows in ((True, True), ("gated", False)):
        model = adapted(start)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        closed_before, grown = None, False
        for _ in range(10):
            model(torch.randn(8, 6, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            closed = torch.cat([E.detach().flatten() == 0 for E in factors(model, "E")])
            if closed_before is not None:
                grown |= bool((closed_before & ~closed).any())
            closed_before = closed
        assert closed_before is not None and grown == grows
