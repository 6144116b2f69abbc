"""Cuts under every optimizer: ranks that are off stay exactly 0, and optimizers' states stay right."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import rankwise as rw
from rankwise.run.factors import Factors
from tiny import told

STEPS = 40


def adapted(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Two layers with 6 ranks each, with cuts at steps 5 to 20 to an average rank of 2."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10)).to(dtype)
    options: dict[str, Any] = {"init_r": 6, "target_r": 2, "tinit": 4, "tfinal": 20, "total_step": STEPS}
    config = rw.AdaLoraConfig(**{**options, "target_modules": ["0", "2"], **changes})
    return rw.get_peft_model(base, config)


def factors(model: nn.Module, *keys: str) -> list[nn.Parameter]:
    keys = keys or ("A", "B")
    return [p for name, p in model.named_parameters() if any(f".lora_{key}." in name for key in keys)]


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 12, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    target = x[:, :10] * x[:, :1] - x[:, 1:11]
    return (model(x) - target).square().mean()


def train(model: Any, *optimizers: Optimizer, steps: int = STEPS, first: int = 1) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(model, step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def what_is_off(model: Any) -> list[Tensor]:
    """The rows of A and columns of B that the last cut switched off."""
    found = []
    for layer, mask in zip((model[0], model[2]), model.rankwise_mask.split(6), strict=True):
        found += [layer.lora_A["default"].detach()[~mask], layer.lora_B["default"].detach().T[~mask]]
    return found


class Lion(Optimizer):
    """Steps by the sign of a mean of gradients, as in Chen et al. (2023)."""

    def __init__(self, params: Any, lr: float = 1e-4, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    mean = state.setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(torch.sign(mean.lerp(p.grad, 0.1)), alpha=group["lr"])
                    mean.lerp_(p.grad, 0.01)


class MadeAtOnce(Optimizer):
    """Has a state that nobody else can rewrite, creates it in the constructor, and fails without it."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 0, "largest": torch.full_like(p, 1e-8)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] += 1
                    largest = torch.maximum(state["largest"], p.grad.abs(), out=state["largest"])
                    p.sub_(p.grad / (largest + 1e-8), alpha=group["lr"])


class MadeFromAModel(MadeAtOnce):
    """The same, but its constructor takes a model, so that no second one can be made for a parameter."""

    def __init__(self, model: nn.Module, *, rate: float) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], rate)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=3e-2),
    "Adagrad, with a first sum": lambda p: torch.optim.Adagrad(p, lr=3e-2, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=3e-3),
    "RMSprop, momentum": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=10),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=3e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Muon": lambda p: torch.optim.Muon(p, lr=1e-2),
    "Lion": lambda p: Lion(p, lr=3e-3, weight_decay=0.1),
    "one of state made at once": lambda p: MadeAtOnce(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_that_are_off_are_exactly_0_at_the_end_and_the_run_learns(name: str) -> None:
    model = adapted()
    optimizer = OPTIMIZERS[name](factors(model))
    before = float(loss_of(model, 0))
    with told() as messages:
        train(model, optimizer)
    assert len(model.rank_history.records) > 10 and not messages
    off = what_is_off(model)
    assert sum(map(len, off)) >= 2 * 6 and not any(values.any() for values in off)
    assert all(p.isfinite().all() for p in factors(model))
    assert loss_of(model, 0) < before


def test_an_optimizer_that_cannot_be_made_again_is_reset_in_place() -> None:
    model = adapted()
    before = float(loss_of(model, 0))
    train(model, optimizer := MadeFromAModel(model, rate=1e-2))
    assert model.allocation_state.reached_target and loss_of(model, 0) < before
    assert not any(values.any() for values in what_is_off(model))
    assert all(state["step"] == 20 for state in optimizer.state.values()), "counted anew since the last cut"


class WithAName(torch.optim.Adagrad):
    """Gives its sum of squares bitsandbytes' name."""

    optimizer_name = "adagrad"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for state in self.state.values():
            state["sum"] = state.pop("state1", state.get("sum"))
        super().step(closure)
        for state in self.state.values():
            state["state1"] = state.pop("sum")


def test_a_sum_of_squares_by_the_name_of_bitsandbytes_is_rewritten_as_one() -> None:
    one, other = adapted(), adapted()
    train(one, torch.optim.Adagrad(factors(one), lr=3e-2))
    train(other, WithAName(factors(other), lr=3e-2))
    assert all(torch.equal(a, b) for a, b in zip(factors(one), factors(other), strict=True))


# --- several optimizers --------------------------------------------------------------------------------------------


def updates(model: Any) -> Tensor:
    return torch.cat([model[n].delta_weight("default").detach().flatten() for n in (0, 2)])


@pytest.mark.parametrize("order", ["AB", "BA"])
def test_with_A_and_B_in_two_optimizers_the_update_is_that_of_one_through_all_cuts(order: str) -> None:
    one, two = adapted(torch.float64), adapted(torch.float64)
    whole = torch.optim.SGD(factors(one), lr=0.3)
    parts = [torch.optim.SGD(factors(two, key), lr=0.3) for key in order]
    for step in range(1, STEPS + 1):
        train(one, whole, steps=1, first=step)
        train(two, *parts, steps=1, first=step)
        assert two.allocation_state.step == one.allocation_state.step == step
        difference = (updates(two) - updates(one)).norm() / updates(one).norm()
        assert difference < 1e-9, f"step {step}: {difference:.2%}"


def test_a_cut_does_not_wait_for_an_optimizer_that_steps_now_and_then() -> None:
    model = adapted()
    often, seldom = (torch.optim.SGD(factors(model, key), lr=0.1) for key in "AB")
    for step in range(1, STEPS + 1):
        train(model, often, *([seldom] if step % 5 == 0 else []), steps=1, first=step)
        assert step - 1 <= model.allocation_state.step <= step
    assert model.allocation_state.reached_target and not any(values.any() for values in what_is_off(model))


def test_an_expected_optimizer_that_is_gone_is_not_waited_for() -> None:
    model = adapted()
    first, second = (torch.optim.SGD(factors(model, key), lr=0.1) for key in "AB")
    train(model, first, second, steps=6)
    del second
    train(model, first, first=7, steps=STEPS - 6)
    assert model.allocation_state.step == STEPS


@pytest.mark.parametrize("name", ["AdamW", "SGD, Nesterov", "RMSprop, centered"])
def test_state_that_an_optimizer_shares_with_its_copy_is_rewritten_once(name: str) -> None:
    plain, shared = adapted(), adapted()
    only = OPTIMIZERS[name](factors(plain))
    first, second = OPTIMIZERS[name](factors(shared)), OPTIMIZERS[name](factors(shared))
    train(plain, only, steps=4)
    train(shared, first, steps=4)
    second.load_state_dict(first.state_dict())  # it copies no tensor of the right dtype and device
    p = factors(shared)[0]
    assert any(first.state[p][key] is value for key, value in second.state[p].items() if value is not None)
    train(plain, only, first=5, steps=STEPS - 4)
    train(shared, second, first=5, steps=STEPS - 4)
    assert first.state, "the first one is still known"
    assert all(torch.equal(a, b) for a, b in zip(factors(plain), factors(shared), strict=True))


def test_an_optimizer_that_adds_noise_is_noticed_and_its_ranks_are_switched_off_again() -> None:
    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn_like(p), alpha=1e-3)
            return result

    model = adapted()
    with told() as messages:
        train(model, Noisy(factors(model), lr=0.05), steps=19)
        assert not any(values.any() for values in what_is_off(model)), "they stay off between the cuts, too"
        model.finalize_ranks()
        assert not any(values.any() for values in what_is_off(model))
    (message,) = messages
    assert "has moved ranks that are off" in message and "switched off again" in message


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("start", ["principal", True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_run_with_cuts_works_whatever_the_default_dtype(
    start: Any, dtype: torch.dtype, double_by_default: None
) -> None:
    model = adapted(dtype, init_lora_weights=start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = train(model, optimizer)
    state = model.allocation_state
    assert state.reached_target and state.skipped_steps == 0 and losses[-1] < losses[0]
    assert model.rankwise_sensitivity.dtype == model.rankwise_uncertainty.dtype == torch.float32
    assert all(p.dtype in (dtype, torch.float32) for p in factors(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_cannot_be_decomposed_is_unchanged_and_reported_and_the_run_continues(
    value: float,
) -> None:
    model = adapted()
    optimizer = torch.optim.SGD(factors(model), lr=0.05)
    train(model, optimizer, steps=8)
    layer, scale = model[0], model[0].scaling["default"]
    rank = model.rank_summary().layers[0].rank
    with torch.no_grad():
        layer.lora_A["default"][0].fill_(value)
        layer.lora_B["default"][:, 0].fill_(value)
    before = [layer.lora_A["default"].detach().clone(), layer.lora_B["default"].detach().clone()]
    with told() as messages, torch.no_grad():
        for p in factors(model):
            p.grad = torch.zeros_like(p)
        for p in factors(model[0]):
            p.grad = None
        model._rankwise_controller._cut(4)
    for was, now in zip(before, (layer.lora_A["default"], layer.lora_B["default"]), strict=True):
        torch.testing.assert_close(now.detach(), was, rtol=0, atol=0, equal_nan=True)
    assert layer.scaling["default"] == scale
    first, second = model.rank_summary().layers
    assert first.rank == rank and second.rank == 2
    assert model[2].scaling["default"] == 2, "which has the scale of the end: lora_alpha 4, by 2"
    (message,) = messages
    assert "'0' holds NaN or infinite values" in message and "1 of 2 layers" in message
    assert all(p.isfinite().all() for p in factors(model[2]))
    with torch.no_grad():  # as a person who watches over a run may do
        for p in factors(model[0]):
            p.nan_to_num_(0, 0, 0).clamp_(-1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, first=9, steps=STEPS - 8)
    assert model.allocation_state.step == STEPS and model.allocation_state.phase == "final"


# --- restarting ----------------------------------------------------------------------------------------------------


def test_a_restarted_run_counts_nothing_of_the_attempt_that_was_given_up() -> None:
    plain, again = adapted(), adapted()
    start = copy.deepcopy([p.detach() for p in factors(again)])
    train(again, torch.optim.AdamW(factors(again), lr=1e-2), steps=4)
    again._rankwise_controller.begin_anew(STEPS)
    for p, value in zip(factors(again), start, strict=True):
        p.data.copy_(value)
    assert again.allocation_state.step == 0 and not again.rankwise_sensitivity.any()
    for model in (plain, again):
        train(model, torch.optim.AdamW(factors(model), lr=1e-2))
    assert again.rank_history == plain.rank_history
    assert all(torch.equal(a, b) for a, b in zip(factors(plain), factors(again), strict=True))
    assert torch.equal(plain.rankwise_sensitivity, again.rankwise_sensitivity)


def test_a_run_restarted_after_a_cut_keeps_the_cut_and_its_history_begins_there() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(factors(model), lr=1e-2)
    train(model, optimizer, steps=9)
    budget, ranks = model.allocation_state.budget, [row.rank for row in model.rank_summary().layers]
    assert budget < 12
    model._rankwise_controller.begin_anew(2 * STEPS)
    (record,) = model.rank_history.records
    assert (record.step, record.budget, list(record.ranks)) == (0, budget, ranks)
    train(model, torch.optim.AdamW(factors(model), lr=1e-2), steps=2 * STEPS)
    state = model.allocation_state
    assert (state.step, state.total_step, state.reached_target) == (2 * STEPS, 2 * STEPS, True)


# --- compiling -----------------------------------------------------------------------------------------------------


def test_a_compiled_model_compiles_at_most_twice_in_a_run_of_many_cuts() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    plain, compiled = adapted(), adapted()
    counter = CompileCounter()
    forward: Any = torch.compile(compiled, backend=counter)
    optimizers = [torch.optim.AdamW(factors(model), lr=1e-2) for model in (plain, compiled)]
    for step in range(1, 21):  # up to the last cut; after it, ranks are dropped and shapes change
        for model, called, optimizer in zip((plain, compiled), (plain, forward), optimizers, strict=True):
            loss_of_called = loss_of(called, step)
            loss_of_called.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert model.allocation_state.step == step
    assert len(compiled.rank_history.records) > 10
    assert counter.frame_count <= 2
    assert compiled.rank_history == plain.rank_history


def test_an_optimizer_without_state_is_not_searched_for_it_after_each_step(monkeypatch: Any) -> None:
    asked = []
    parameter = Factors.parameter
    monkeypatch.setattr(Factors, "parameter", lambda self, n: asked.append(n) or parameter(self, n))
    counts = []
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        model = adapted()
        steps = optimizer(factors(model), lr=1e-3)
        train(model, steps, steps=30)
        asked.clear()
        train(model, steps, steps=5, first=31)
        counts.append(len(asked))
    assert counts[0] == counts[1]
