"""PEFT's layers under optimizers whose memory is not that of Adam in float32, and in loops that go on after the end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

import rankwise as rw
from lora_world import examples, with_lora
from tiny import told

WIDE = 1024  # so that 8-bit optimizers keep A and B in 8 bits: they leave tensors below 4096 numbers alone
STEPS = 24


def eight_bit(package: str) -> Callable[..., Optimizer]:
    if package == "bitsandbytes":
        optimizer: Any = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    else:
        optimizer = pytest.importorskip("torchao.optim").AdamW8bit
    return optimizer  # type: ignore[no-any-return]


def wide(own_layers: bool) -> tuple[Any, Any]:
    """A model with an adapter whose ranks adapt, and the handle of its run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, WIDE), nn.Tanh(), nn.Linear(WIDE, 32))
    schedule: dict[str, Any] = {"target_r": 4, "total_step": STEPS, "tinit": 4, "tfinal": 8, "deltaT": 4}
    if own_layers:
        config = rw.AdaLoraConfig(init_r=8, lora_alpha=8, target_modules=["0", "2"], **schedule)
        adapted = rw.get_peft_model(model, config)
        return adapted, adapted
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["0", "2"]))
    return adapted, rw.adapt_ranks(adapted, **schedule)


def losses(
    model: Any, optimizer: Optimizer, steps: int, each: Callable[[], None] | None = None
) -> list[float]:
    torch.manual_seed(1)
    x, y = torch.randn(64, 32), torch.randn(64, 32)
    found = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
        if each is not None:
            each()
    return found


def trained(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("own_layers", [True, False], ids=["rankwise's", "PEFT's"])
@pytest.mark.parametrize("package", ["bitsandbytes", pytest.param("torchao", marks=pytest.mark.slow)])
def test_a_model_large_enough_for_8_bit_states_learns_as_with_adamw(package: str, own_layers: bool) -> None:
    model, run = wide(own_layers)
    optimizer = eight_bit(package)(trained(model), lr=1e-3)
    factors = run._rankwise_controller.factors

    def nothing_is_on_that_is_off() -> None:
        for key in () if getattr(run, "is_over", False) else "AB":
            for rows, kept in zip(factors.rows(key), factors.mask.split(factors.layout.ranks), strict=True):
                assert not rows[~kept].any()

    eight = losses(model, optimizer, STEPS, nothing_is_on_that_is_off)
    other, _ = wide(own_layers)
    full = losses(other, AdamW(trained(other), lr=1e-3), STEPS)
    assert eight[0] - eight[-1] > 0.8 * (full[0] - full[-1])


def test_a_loop_that_keeps_the_last_loss_trains_on_after_the_layers_were_narrowed() -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=2, total_step=6)
    optimizer = AdamW(trained(model), lr=1e-2)
    x, y = examples("linear")
    for _ in range(9):
        loss = (model(x) - y).square().mean()  # the graph of the step before lives until here
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ranks.is_over
    assert all(parameter.grad is None for parameter in trained(model))


def test_lbfgs_forgets_its_history_at_each_cut_wherever_it_keeps_it() -> None:
    model = with_lora("linear", modules_to_save=["4"], target_modules=["0", "2"])
    ranks = rw.adapt_ranks(model, target_r=2, total_step=8, tinit=1, tfinal=3)
    own = {id(each) for each in ranks._rankwise_controller.factors.all_parameters()}
    # LBFGS keeps its history with the first parameter, which is the head's here.
    optimizer = LBFGS(sorted(trained(model), key=lambda each: id(each) in own), lr=0.3, max_iter=3)
    x, y = examples("linear")
    seen = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        seen.append(float(loss.detach()))
        return loss

    for _ in range(12):
        optimizer.step(closure)
    assert ranks.is_over and seen[-1] < seen[0]
    assert max(seen) <= 1.05 * seen[0]


class Remembering(SGD):
    """Momentum in a place that nobody knows: a list, an attribute, or under a name."""

    def __init__(self, parameters: Any, place: str, **settings: Any) -> None:
        self.place, self.elsewhere = place, dict[int, torch.Tensor]()
        super().__init__(parameters, **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            if parameter.grad is None:
                continue
            if self.place == "list":
                held = self.state[parameter].setdefault("moments", [torch.zeros_like(parameter)])[0]
            elif self.place == "name":
                held = self.state[str(number)].setdefault("moments", torch.zeros_like(parameter))
            else:
                held = self.elsewhere.setdefault(id(parameter), torch.zeros_like(parameter))
            held.mul_(0.9).add_(parameter.grad)
            parameter.sub_(held, alpha=1e-2)


@pytest.mark.parametrize("place", ["list", "name"])
def test_what_an_optimizer_remembers_in_lists_or_under_names_is_forgotten_at_a_cut(place: str) -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=2, total_step=8, tinit=1, tfinal=3, deltaT=1)
    with told() as messages:
        optimizer = Remembering(trained(model), place)
        x, y = examples("linear")
        for _ in range(10):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert ranks.is_over and not messages


def test_ranks_that_an_optimizer_moves_by_itself_stay_off_from_the_next_cut_to_the_end() -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=2, total_step=20, tinit=1, tfinal=12, deltaT=1)
    ranks.leave_the_end_to(trainer=True)
    factors = ranks._rankwise_controller.factors
    optimizer = Remembering(trained(model), "attribute")
    x, y = examples("linear")
    with told() as messages:
        for _ in range(20):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len([each for each in messages if "moved ranks that are off" in each]) == 1
    for key in "AB":
        for rows, kept in zip(factors.rows(key), factors.mask.split(factors.layout.ranks), strict=True):
            assert not rows[~kept].any()
    before = model(x)
    ranks.end()
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("own_layers", [True, False], ids=["rankwise's", "PEFT's"])
def test_a_run_that_is_finished_before_its_first_step_after_resuming_trains_on_as_if_undisturbed(
    own_layers: bool,
) -> None:
    def begin() -> tuple[Any, ...]:
        model, ranks = wide(own_layers)
        return model, AdamW(trained(model), lr=1e-3), ranks

    model, optimizer, ranks = begin()
    losses(model, optimizer, 10)
    saved = [copy.deepcopy(each.state_dict()) for each in (model, optimizer, ranks)]
    ranks.finalize_ranks()
    expected = losses(model, optimizer, 6)

    resumed = begin()
    for each, state in zip(resumed, saved, strict=True):
        each.load_state_dict(state)
    resumed[2].finalize_ranks()
    assert losses(resumed[0], resumed[1], 6) == expected
