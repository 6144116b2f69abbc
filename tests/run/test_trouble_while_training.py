"""Everything that can happen to a run while it trains: it just works, or there is one clear warning."""

from __future__ import annotations

import copy
import gc
import math
import multiprocessing
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.run import hooks as listening
from rankwise.run.run_tensors import BUFFERS
from tiny import bert, fresh_accelerator, llama, token_batches, told

STEPS, LAST_ALLOCATION, TARGET = 12, 9, 6


# --- a small run ---------------------------------------------------------------------------------------------------


def adapted(seed: int = 0, base: nn.Module | None = None, **changes: Any) -> Any:
    """Three linear layers with 4 triplets each. 6 triplets stay at the end, chosen at step 9 of 12."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    options = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": STEPS - LAST_ALLOCATION, "total_step": STEPS}
    # The paper's form, in which most can go wrong: a penalty, E that trains, ranks that grow back.
    options |= {"target_modules": ["0", "2", "4"], "init_lora_weights": True}
    config = rw.AdaLoraConfig(**{**options, **changes})
    return rw.get_peft_model(layers if base is None else base, config)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), **{"lr": 0.02, **options})


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator)
    return (model(x) - x[:, :3].square()).square().mean()


def train(model: Any, *optimizers: torch.optim.Optimizer, steps: range = range(1, STEPS + 1)) -> None:
    for step in steps:
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def factors(model: nn.Module, *kinds: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if any(f"lora_{kind}." in name for kind in kinds)]


def same_run(one: Any, other: Any) -> bool:
    """Whether two models are in the same state, bit for bit: values, scores, ranks, step and history."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def finished(model: Any) -> bool:
    state = model.allocation_state
    return state.step == STEPS and model.rank_summary().total_rank == state.budget == TARGET


# --- values that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_left_out_of_the_scores_and_counted_and_reported_once(
    value: float,
) -> None:
    model = adapted()
    optimizer = adamw(model)
    with told() as messages:
        for step in range(1, STEPS + 1):
            before = copy.deepcopy(model.state_dict())
            loss_of(model, step).backward()
            broken = step in (3, 4, 6)
            if broken:
                factors(model, "B")[1].grad[0, 0] = value
            optimizer.step()
            optimizer.zero_grad()
            if broken:  # the weights are restored, as by a person who watches over the run
                scores = [model.rankwise_sensitivity.clone(), model.rankwise_uncertainty.clone()]
                assert torch.equal(scores[0], before["rankwise_sensitivity"])
                assert torch.equal(scores[1], before["rankwise_uncertainty"])
                for name, parameter in model.named_parameters():
                    parameter.data.copy_(before[name])
                optimizer.state.clear()
    assert finished(model)
    assert model.allocation_state.skipped_steps == 3
    assert model.rankwise_sensitivity.isfinite().all() and model.rankwise_sensitivity.any()
    (message,) = messages
    assert "Step 3" in message and "left out of the importance scores" in message


def test_a_loss_that_is_nan_to_the_end_still_leaves_a_run_that_meets_its_budget() -> None:
    model = adapted()
    optimizer = adamw(model)
    with told() as messages:
        for step in range(1, STEPS + 1):
            loss = loss_of(model, step)
            (loss if step < 5 else loss * math.nan).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert finished(model) or model.rankwise_mask.sum() == TARGET
    assert model.allocation_state.skipped_steps == LAST_ALLOCATION - 5
    assert len(messages) == 1


# --- steps that are skipped or accumulated -------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_the_grad_scaler_skips_does_not_count(fused: bool) -> None:
    model = adapted()
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with told() as messages:
        for step in range(1, STEPS + 1):
            loss = loss_of(model, step) * (math.inf if step in (1, 5) else 1.0)
            scaler.scale(loss).backward()
            before = [parameter.detach().clone() for parameter in trainable(model)]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moved = any(not torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))
            assert moved == (step not in (1, 5))
    assert model.allocation_state.step == STEPS - 2
    assert model.allocation_state.skipped_steps == 0
    assert not messages


@pytest.mark.parametrize("unscales", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_grad_scaler_changes_nothing_in_penalty_scores_and_ranks(fused: bool, unscales: bool) -> None:
    plain, scaled = adapted(), adapted()
    train(plain, adamw(plain, fused=fused))
    optimizer = adamw(scaled, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    for step in range(1, STEPS + 1):
        scaler.scale(loss_of(scaled, step)).backward()
        if unscales:  # as gradient clipping does
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert torch.equal(scaled.rankwise_mask, plain.rankwise_mask)
    torch.testing.assert_close(scaled.rankwise_sensitivity, plain.rankwise_sensitivity)
    for ours, theirs in zip(trainable(scaled), trainable(plain), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_that_are_accumulated_make_one_step() -> None:
    whole, parts = adapted(), adapted()
    train(whole, adamw(whole))
    optimizer = adamw(parts)
    for step in range(1, STEPS + 1):
        for _ in range(4):
            (loss_of(parts, step) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert finished(parts)
    assert parts.rank_history == whole.rank_history
    torch.testing.assert_close(parts.rankwise_sensitivity, whole.rankwise_sensitivity)


def test_accelerate_accumulating_gradients_makes_one_step_of_several_batches() -> None:
    pytest.importorskip("accelerate")
    accelerator = fresh_accelerator(gradient_accumulation_steps=3)
    model, optimizer = accelerator.prepare(model := adapted(), adamw(model))
    for batch in range(3 * STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    assert finished(model)


# --- parts that don't train, or not always -------------------------------------------------------------------------


def freeze(model: nn.Module, layer: int, frozen: bool = True) -> None:
    for parameter in factors(model[layer], "A", "B", "E"):
        parameter.requires_grad_(not frozen)


def test_a_layer_frozen_midway_keeps_its_ranks_and_values_while_the_others_reach_their_share() -> None:
    model = adapted()
    optimizer = adamw(model)
    train(model, optimizer, steps=range(1, 6))
    freeze(model, 2)
    held = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("2.")}
    rank = model.rank_summary().layers[1].rank
    train(model, optimizer, steps=range(6, STEPS + 1))
    ranks = [row.rank for row in model.rank_summary().layers]
    assert ranks[1] == rank
    assert ranks[0] + ranks[2] == 2 * 2
    kept = model.rankwise_mask[4:8]
    for name, value in held.items():
        if "lora_E" in name:
            assert torch.equal(model.state_dict()[name][kept], value[kept])
        elif "lora" in name:
            assert torch.equal(model.state_dict()[name], value)
    assert model.allocation_state.step == STEPS and model.allocation_state.phase == "final"


def test_a_layer_thawed_midway_takes_part_again_and_the_target_is_met() -> None:
    model = adapted()
    freeze(model, 0)
    optimizer = torch.optim.AdamW(factors(model, "A", "B", "E"), lr=0.02)
    train(model, optimizer, steps=range(1, 6))
    assert model.rank_summary().layers[0].rank == 4
    freeze(model, 0, frozen=False)
    train(model, optimizer, steps=range(6, STEPS + 1))
    assert finished(model)


def test_an_allocation_leaves_frozen_layers_alone_whatever_the_scores_of_the_others() -> None:
    model = adapted()
    optimizer = adamw(model)
    train(model, optimizer, steps=range(1, 5))
    freeze(model, 4)
    before = model.rankwise_mask[8:].clone()
    model.rankwise_sensitivity.fill_(3e38)  # the products overflow: all scores are infinite
    model.rankwise_uncertainty.fill_(3e38)
    model.finalize_ranks()
    assert torch.equal(model.rankwise_mask[8:], before)
    assert int(model.rankwise_mask[:8].sum()) == 2 * 2


def test_nothing_is_counted_while_the_whole_adapter_is_frozen() -> None:
    model = adapted()
    head = nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*trainable(model), *head.parameters()], lr=0.1)
    train(model, optimizer, steps=range(1, 4))
    for layer in (0, 2, 4):
        freeze(model, layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with told() as messages:
        head(model(torch.randn(4, 6))).sum().backward()
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not messages


class TwoWays(nn.Module):
    """Each forward pass goes through one of two branches, as in mixtures of experts and with dropped layers."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.way = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.ways[self.way](x)


def scores_of_layers(model: Any, layers: int) -> list[Tensor]:
    """The running averages of each layer's A, which come first. All layers must have one shape."""
    elements = factors(model, "A")[0].numel()
    return list(model.rankwise_sensitivity[: layers * elements].clone().split(elements))


def test_layers_that_a_step_does_not_use_keep_their_scores() -> None:
    torch.manual_seed(0)
    model = adapted(base=TwoWays(), target_modules=["ways.0", "ways.1"])
    optimizer = adamw(model)
    with told() as messages:
        for step in range(1, STEPS + 1):
            model.way = step % 2
            before = scores_of_layers(model, 2)
            train(model, optimizer, steps=range(step, step + 1))
            after = scores_of_layers(model, 2)
            assert torch.equal(after[1 - model.way], before[1 - model.way])
            assert torch.equal(after[model.way], before[model.way]) == (step >= LAST_ALLOCATION)
    assert model.rank_summary().total_rank == 4 and model.allocation_state.step == STEPS
    assert not messages


def test_a_step_without_any_gradient_in_the_adapter_is_reported_once() -> None:
    model = adapted()
    optimizer = adamw(model)
    with told() as messages:
        for _ in range(3):
            optimizer.step()
    assert model.allocation_state.step == 3
    (message,) = messages
    assert "no adapter parameter has a gradient" in message


@pytest.mark.parametrize(("start", "decisive"), [("principal", "lora_B"), (True, "lora_E")])
def test_a_decisive_factor_that_is_frozen_in_all_layers_is_named(start: Any, decisive: str) -> None:
    model = adapted(init_lora_weights=start)
    for name, parameter in model.named_parameters():
        if f".{decisive}." in name:
            torch.nn.init.ones_(parameter.requires_grad_(False))
    with told() as messages:
        train(model, adamw(model))
    assert model.allocation_state.budget == model.allocation_state.initial
    assert [decisive in each and "none is cut" in each for each in messages] == [True]


# --- optimizers ----------------------------------------------------------------------------------------------------


def test_an_optimizer_built_before_the_model_was_adapted_is_reported_once() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    early = torch.optim.AdamW(base.parameters(), lr=0.02)
    model = adapted(base=base, target_modules=["0", "2"])
    with told() as messages:
        train(model, early, steps=range(1, 4))
    (message,) = messages
    assert "Build the optimizer after the adapter is attached" in message
    assert model.allocation_state.step == 0
    train(model, adamw(model))
    assert model.allocation_state.step == STEPS


def test_optimizers_without_parameters_of_the_adapter_count_nothing_and_get_no_warning() -> None:
    model, other = adapted(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(1, 2)).sum().backward()
    with told() as messages:
        optimizer.step()
    assert model.allocation_state.step == 0 and not messages


SPLITS: dict[str, Callable[[Any], list[list[nn.Parameter]]]] = {
    "A, then E and B": lambda model: [factors(model, "A"), factors(model, "E", "B")],
    "E, then A and B": lambda model: [factors(model, "E"), factors(model, "A", "B")],
    "B, then E, then A": lambda model: [factors(model, kind) for kind in "BEA"],
    "a layer each": lambda model: [factors(model[layer], "A", "B", "E") for layer in (4, 0, 2)],
}


@pytest.mark.parametrize("split", SPLITS)
def test_two_optimizers_that_share_the_adapter_count_an_iteration_as_one_step(split: str) -> None:
    alone, shared = adapted(), adapted()
    only = torch.optim.SGD(trainable(alone), lr=0.1)
    several = [torch.optim.SGD(parameters, lr=0.1) for parameters in SPLITS[split](shared)]
    with told() as messages:
        for step in range(1, STEPS + 1):
            train(alone, only, steps=range(step, step + 1))
            train(shared, *several, steps=range(step, step + 1))
            assert shared.allocation_state.step == step
            if step <= 2:  # until the first allocation, the penalties must be equal, too
                for ours, theirs in zip(trainable(shared), trainable(alone), strict=True):
                    torch.testing.assert_close(ours, theirs)
    assert finished(shared) and not messages


def test_an_optimizer_for_the_head_counts_nothing_and_gets_no_warning() -> None:
    config = rw.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, total_step=6, target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )  # fmt: skip
    model = rw.get_peft_model(bert(), config)
    head = [parameter for name, parameter in model.named_parameters() if "classifier" in name]
    optimizers = [torch.optim.AdamW(head, lr=1e-2), torch.optim.AdamW(factors(model, "A", "B", "E"), lr=1e-2)]
    with told() as messages:
        for batch in token_batches(6):
            model(input_ids=batch["input_ids"], labels=batch["labels"][:, 0] % 3).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert model.allocation_state.step == 6 and model.rank_summary().total_rank == 8
    assert not messages


@pytest.mark.filterwarnings("ignore:Training goes on past")
def test_an_optimizer_that_steps_more_often_than_the_one_with_the_singular_values_does_not_stop_the_run() -> (
    None
):
    model = adapted()
    often = torch.optim.SGD(factors(model, "A", "B"), lr=0.1)
    seldom = torch.optim.SGD(factors(model, "E"), lr=0.1)
    for step in range(1, 5 * STEPS):
        train(model, often, *([seldom] if step % 5 == 0 else []), steps=range(step, step + 1))
    assert model.allocation_state.phase == "final" and model.rank_summary().total_rank == TARGET


def test_an_optimizer_that_holds_only_a_part_of_the_adapter_counts_all_the_same() -> None:
    model = adapted()
    train(model, adamw(model[2]))
    assert finished(model)


def test_an_optimizer_rebuilt_midway_takes_over_while_the_old_one_still_exists() -> None:
    model = adapted()
    first, second = adamw(model), adamw(model)
    train(model, first, steps=range(1, 6))
    train(model, second, steps=range(6, STEPS + 1))
    assert finished(model)


class Lookahead(torch.optim.Optimizer):
    """Steps an optimizer of its own, like optimizers that shard, average or look ahead."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


class Sharding(torch.optim.Optimizer):
    """Holds all parameters, and steps them by several optimizers of its own. The last one holds lora_E."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, in_a_list: bool) -> None:
        super().__init__(parameters, {})
        self.first, self.last = (
            torch.optim.SGD([p for p in parameters if (p.shape[1] == 1) is has_E], lr=lr)
            for has_E in (False, True)
        )
        if in_a_list:
            self.inner = [self.__dict__.pop("first"), self.__dict__.pop("last")]

    def step(self, closure: Any = None) -> Any:
        for optimizer in getattr(self, "inner", None) or [self.first, self.last]:
            optimizer.step()


class Decorated(torch.optim.AdamW):
    """A subclass whose step calls the original step, so that hooks fire twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True], ids=["step()", "step(closure)"])
@pytest.mark.parametrize(
    "build", [lambda p: Lookahead(torch.optim.AdamW(p, lr=0.02)), lambda p: Decorated(p, lr=0.02)],
    ids=["wrapper", "subclass"],
)  # fmt: skip
def test_an_optimizer_inside_another_neither_counts_nor_penalizes_twice(
    build: Any, with_closure: bool
) -> None:
    plain, wrapped = adapted(), adapted()
    train(plain, torch.optim.AdamW(trainable(plain), lr=0.02))
    optimizer = build(trainable(wrapped))
    if with_closure:
        train_with_closure(wrapped, optimizer)
    else:
        train(wrapped, optimizer)
    assert same_run(wrapped, plain)


@pytest.mark.parametrize("in_a_list", [False, True])
def test_an_optimizer_that_steps_others_scores_when_all_have_stepped(in_a_list: bool) -> None:
    plain, sharding = adapted(), adapted()
    train(plain, torch.optim.SGD(trainable(plain), lr=0.1))
    train(sharding, Sharding(trainable(sharding), lr=0.1, in_a_list=in_a_list))
    assert same_run(sharding, plain)


def train_with_closure(model: Any, optimizer: torch.optim.Optimizer, by_name: bool = False) -> list[float]:
    losses = []
    for step in range(1, STEPS + 1):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        losses.append((optimizer.step(closure=closure) if by_name else optimizer.step(closure)).item())
    return losses


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_that_computes_the_gradients_within_the_step_changes_nothing(by_name: bool) -> None:
    plain, closed = adapted(), adapted()
    train(plain, adamw(plain))
    train_with_closure(closed, adamw(closed), by_name)
    assert same_run(closed, plain)


def test_a_step_that_fails_is_not_counted_and_has_no_later_effect() -> None:
    class FailsOnce(torch.optim.SGD):
        failed = False

        def step(self, closure: Any = None) -> Any:
            if not self.failed:
                self.failed = True
                raise RuntimeError("out of memory")
            return super().step(closure)

    plain, failing = adapted(), adapted()
    train(plain, torch.optim.SGD(trainable(plain), lr=0.1))
    optimizer = FailsOnce(trainable(failing), lr=0.1)
    loss_of(failing, 1).backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.step()
    optimizer.zero_grad()
    train(failing, optimizer, steps=range(2, STEPS + 1))
    assert same_run(failing, plain)


def test_an_optimizer_whose_first_step_fails_can_be_replaced() -> None:
    model = adapted()
    # PyTorch has no such AdamW for the CPU, and raises an error in the first step
    unfit = adamw(model, capturable=True)
    loss_of(model, 1).backward()
    with pytest.raises(AssertionError, match="capturable"):
        unfit.step()
    model.zero_grad()
    train(model, adamw(model))
    assert finished(model)


def test_parameter_groups_added_later_are_penalized_and_scored_from_then_on() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(factors(model[0], "A", "B"), lr=0.1)
    train(model, optimizer, steps=range(1, 4))
    optimizer.add_param_group({"params": factors(model[0], "E") + factors(model[2], "A", "B", "E")})
    optimizer.add_param_group({"params": factors(model[4], "A", "B", "E"), "lr": 0.05})
    before = model[4].lora_A["default"].detach().clone()
    train(model, optimizer, steps=range(4, STEPS + 1))
    assert not torch.equal(model[4].lora_A["default"], before)
    assert finished(model)


KINDS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW, one tensor at a time": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "PyTorch's Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
}


@pytest.mark.parametrize("kind", [*KINDS, "Transformers' Adafactor"])
def test_every_kind_of_optimizer_drives_the_run(kind: str) -> None:
    model = adapted()
    if kind in KINDS:
        optimizer = KINDS[kind](trainable(model))
    else:
        from transformers import Adafactor

        optimizer = Adafactor(trainable(model), lr=0.02, relative_step=False, scale_parameter=False)
    before = float(model.orthogonal_penalty())
    with told() as messages:
        train(model, optimizer)
    assert finished(model) and not messages
    assert model.allocation_state.skipped_steps == 0
    assert float(model.orthogonal_penalty()) < before


def test_an_optimizer_that_maximizes_still_makes_the_penalty_smaller() -> None:
    model = adapted(orth_reg_weight=5.0)
    before = float(model.orthogonal_penalty())
    optimizer = torch.optim.SGD(trainable(model), lr=0.1, maximize=True)
    for step in range(1, STEPS + 1):
        (-loss_of(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert finished(model) and float(model.orthogonal_penalty()) < before


def test_lbfgs_is_refused_with_the_penalty_and_works_without() -> None:
    refused = adapted()
    optimizer = torch.optim.LBFGS(trainable(refused), lr=0.1, max_iter=4)
    with pytest.raises(ValueError, match=r"LBFGS .* set `orth_reg_weight=0` \(it is 0.5\), or use another"):
        train_with_closure(refused, optimizer)
    model = adapted(orth_reg_weight=0)
    losses = train_with_closure(model, torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=4))
    assert finished(model)
    assert losses[-1] < losses[0]


# --- several models, copies, moves ---------------------------------------------------------------------------------


def test_several_models_in_one_process_train_as_if_alone() -> None:
    alone = [adapted(seed, deltaT=1 + seed) for seed in range(3)]
    for model in alone:
        train(model, adamw(model))
    together = [adapted(seed, deltaT=1 + seed) for seed in range(3)]
    optimizers = [adamw(model) for model in together]
    for step in range(1, STEPS + 1):
        for model, optimizer in zip(together, optimizers, strict=True):
            train(model, optimizer, steps=range(step, step + 1))
    assert all(same_run(one, other) for one, other in zip(alone, together, strict=True))


def test_one_optimizer_can_drive_two_models() -> None:
    alone = [adapted(seed) for seed in range(2)]
    for model in alone:
        train(model, adamw(model))
    together = [adapted(seed) for seed in range(2)]
    optimizer = torch.optim.AdamW([p for model in together for p in trainable(model)], lr=0.02)
    for step in range(1, STEPS + 1):
        sum(loss_of(model, step) for model in together).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(same_run(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_copy_made_in_any_phase_trains_on_by_itself(duplicate: Any, stop: int) -> None:
    model = adapted()
    train(model, torch.optim.SGD(trainable(model), lr=0.1), steps=range(1, stop + 1))
    twin = duplicate(model)
    assert type(twin) is type(model) and same_run(twin, model)
    train(twin, torch.optim.SGD(trainable(twin), lr=0.1), steps=range(stop + 1, STEPS + 1))
    assert model.allocation_state.step == stop
    train(model, torch.optim.SGD(trainable(model), lr=0.1), steps=range(stop + 1, STEPS + 1))
    assert finished(model) and same_run(twin, model)


def test_a_copy_of_a_transformers_model_keeps_all_its_ways_to_be_called() -> None:
    config = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=4, target_modules=["q_proj"])
    model = rw.get_peft_model(llama(), config)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    batch = token_batches(1)[0]
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    twin(**batch).loss.backward()
    adamw(twin).step()
    twin.base_model.update_and_allocate(1)  # PEFT has it there, too
    assert (twin.allocation_state.step, model.allocation_state.step) == (1, 0)


def train_and_send(model: Any, connection: Any) -> None:
    train(model, torch.optim.SGD(trainable(model), lr=0.1), steps=range(5, STEPS + 1))
    connection.send({key: value.tolist() for key, value in model.state_dict().items()})


def test_a_model_sent_to_a_spawned_process_trains_on_there() -> None:
    model = adapted()
    train(model, torch.optim.SGD(trainable(model), lr=0.1), steps=range(1, 5))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=train_and_send, args=(pickle.loads(pickle.dumps(model)), theirs))
    process.start()
    assert ours.poll(120)
    there = ours.recv()
    process.join(60)
    train(model, torch.optim.SGD(trainable(model), lr=0.1), steps=range(5, STEPS + 1))
    assert {key: value.tolist() for key, value in model.state_dict().items()} == there


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_survive_a_model_that_goes_to_another_dtype_and_back(dtype: torch.dtype) -> None:
    model = adapted()
    optimizer = adamw(model)
    train(model, optimizer, steps=range(1, 6))
    before = {name: getattr(model, name).clone() for name in BUFFERS}
    wrapper = nn.ModuleDict({"inner": model})
    wrapper.to(dtype)
    assert model(torch.randn(2, 6, dtype=dtype)).dtype == dtype
    assert model.rank_summary().total_rank
    wrapper.float()
    for name, value in before.items():
        assert torch.equal(getattr(model, name), value) and getattr(model, name).dtype == value.dtype
    train(model, optimizer, steps=range(6, STEPS + 1))
    assert finished(model)


def test_a_model_trains_in_bfloat16_with_scores_in_float32() -> None:
    model = adapted().bfloat16()
    optimizer = adamw(model)
    for _ in range(STEPS):
        model(torch.randn(16, 6, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert finished(model) and model.rankwise_sensitivity.dtype is torch.float32


def test_a_model_that_goes_away_is_freed_at_once_and_nothing_keeps_it() -> None:
    gc.collect()
    before = len(listening._listeners)
    gc.disable()  # anything freed now is freed by its last reference, not by a later collection
    try:
        model = adapted()
        train(model, adamw(model))
        gone = [weakref.ref(model), weakref.ref(model[0]), weakref.ref(factors(model, "A")[0])]
        del model
        assert [reference() for reference in gone] == [None] * 3

        language_model = rw.get_peft_model(
            llama(), rw.AdaLoraConfig(init_r=4, target_r=2, total_step=4, target_modules=["q_proj"])
        )
        gone = [weakref.ref(language_model), weakref.ref(language_model.model)]
        del language_model
        assert [reference() for reference in gone] == [None] * 2
    finally:
        gc.enable()
    assert len(listening._listeners) == before


def test_an_error_that_a_notebook_keeps_does_not_stop_the_next_model_from_training() -> None:
    model = adapted(total_step=None)
    optimizer = adamw(model)
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match="length of the run is not known") as kept:
        optimizer.step()
    model = adapted()
    optimizer = adamw(model)

    train(model, optimizer)

    assert finished(model) and kept.tb is not None


def test_optimizers_that_come_and_go_leave_nothing_behind() -> None:
    model = adapted(total_step=1000, tfinal=0)
    other = nn.Linear(2, 2)
    for step in range(1, 101):
        optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
        train(model, optimizer, steps=range(step, step + 1))
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    controller = model._rankwise_controller
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None
    assert model.allocation_state.step == 100
    assert len(controller.optimizers.known()) == 0 and len(controller.factors._indices) < 10


# --- by hand -------------------------------------------------------------------------------------------------------


def train_by_hand(model: Any, first: int, after_zero_grad: bool, steps: range = range(1, STEPS + 1)) -> None:
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        if after_zero_grad:
            optimizer.zero_grad()
        model.update_and_allocate(step - 1 + first)
        optimizer.zero_grad()


@pytest.mark.parametrize("after_zero_grad", [False, True], ids=["before zero_grad", "after zero_grad"])
def test_update_and_allocate_by_hand_from_step_1_is_the_automatic_run(after_zero_grad: bool) -> None:
    automatic, by_hand = adapted(), adapted()
    train(automatic, torch.optim.SGD(trainable(automatic), lr=0.1))
    with told() as messages:
        train_by_hand(by_hand, first=1, after_zero_grad=after_zero_grad)
    assert finished(by_hand) and not messages
    assert by_hand.rank_history == automatic.rank_history
    for ours, theirs in zip(by_hand.parameters(), automatic.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(by_hand.rankwise_sensitivity, automatic.rankwise_sensitivity)


@pytest.mark.parametrize("after_zero_grad", [False, True], ids=["before zero_grad", "after zero_grad"])
def test_update_and_allocate_by_hand_from_step_0_is_one_step_late_and_counts_no_step_twice(
    after_zero_grad: bool,
) -> None:
    model = adapted()
    with told() as messages:
        train_by_hand(model, first=0, after_zero_grad=after_zero_grad)
    assert not messages
    assert model.allocation_state.step == STEPS - 1 and model.rank_summary().total_rank == TARGET
    assert [record.step for record in model.rank_history.records] == [0, 3, 4, 5, 6, 7, 8, 9]


def test_steps_counted_automatically_and_then_by_hand_are_counted_once() -> None:
    automatic, mixed = adapted(), adapted()
    train(automatic, torch.optim.SGD(trainable(automatic), lr=0.1))
    train(mixed, torch.optim.SGD(trainable(mixed), lr=0.1), steps=range(1, 6))
    train_by_hand(mixed, first=1, after_zero_grad=False, steps=range(6, STEPS + 1))
    assert finished(mixed) and mixed.rank_history == automatic.rank_history
    assert torch.equal(mixed.rankwise_sensitivity, automatic.rankwise_sensitivity)


def test_a_step_named_twice_by_hand_is_counted_once() -> None:
    once, twice = adapted(), adapted()
    for model, times in ((once, 1), (twice, 2)):
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        for step in range(1, STEPS + 1):
            loss_of(model, step).backward()
            optimizer.step()
            for _ in range(times):
                model.update_and_allocate(step)
            optimizer.zero_grad()
    assert same_run(once, twice)


@pytest.mark.parametrize("step", [-1, 1.5, True, None])
def test_an_invalid_step_by_hand_is_refused(step: Any) -> None:
    model = adapted()
    with pytest.raises((TypeError, ValueError), match="`global_step` must be"):
        model.update_and_allocate(step)
    train(model, adamw(model))
    assert finished(model)


# --- runs that are shorter or longer than planned ------------------------------------------------------------------


def test_training_past_the_last_step_is_reported_once_and_changes_no_rank() -> None:
    model = adapted()
    optimizer = adamw(model)
    train(model, optimizer)
    ranks = model.rankwise_mask.clone()
    with told() as messages:
        train(model, optimizer, steps=range(STEPS + 1, STEPS + 10))
    (message,) = messages
    assert "past total_step=12" in message
    assert torch.equal(model.rankwise_mask, ranks) and model.allocation_state.step == STEPS + 9


def saved_ranks(folder: Path) -> int:
    loaded = rw.PeftModel.from_pretrained(nn.Sequential(*adapted().unload()), folder)
    return int(loaded.rank_summary().total_rank)


@pytest.mark.parametrize("paper", [True, False])
def test_steps_that_no_optimizer_took_are_reported_on_saving(paper: bool, tmp_path: Path) -> None:
    model = adapted(init_lora_weights=True if paper else "principal")
    with told() as messages:
        model.save_pretrained(tmp_path)  # an adapter that has not trained
        for step in range(1, 3):
            loss_of(model, step).backward()
            with torch.no_grad():
                for parameter in trainable(model):
                    parameter -= 0.1 * parameter.grad
            model.zero_grad()
        model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
    (message,) = messages
    assert "No rank was cut" in message and "`model.update_and_allocate(step)`" in message


def test_a_run_that_ends_early_gives_a_warning_on_saving_and_is_finished_by_one_call(tmp_path: Path) -> None:
    model = adapted()
    train(model, adamw(model), steps=range(1, 5))
    with told() as messages:
        model.save_pretrained(tmp_path / "early")
        model.save_pretrained(tmp_path / "early")
    (message,) = messages
    assert f"At step 4 the budget is {model.allocation_state.budget} ranks; its target is 6" in message
    assert "reaches at step 9" in message and "`model.finalize_ranks()`" in message
    assert saved_ranks(tmp_path / "early") > TARGET

    model.finalize_ranks()
    with told() as messages:
        model.save_pretrained(tmp_path / "final")
    assert not messages
    assert model.allocation_state.phase == "final"
    assert model.rank_summary().total_rank == saved_ranks(tmp_path / "final") == TARGET


def test_a_run_that_ends_before_its_last_cut_but_at_its_target_gives_no_warning(tmp_path: Path) -> None:
    model = adapted()
    train(model, adamw(model), steps=range(1, 9))
    state = model.allocation_state
    assert (state.phase, state.budget) == ("pruning", state.target)
    with told() as messages:
        model.save_pretrained(tmp_path / "saved")
    assert not messages and saved_ranks(tmp_path / "saved") == TARGET


def test_a_run_that_ends_when_the_budget_is_low_but_not_final_gives_a_warning(tmp_path: Path) -> None:
    model = adapted(deltaT=5)  # at step 8 the schedule's budget rounds to 6, but no allocation has met it
    train(model, adamw(model), steps=range(1, LAST_ALLOCATION))
    with told() as messages:
        model.save_pretrained(tmp_path)
    assert len(messages) == 1
    assert saved_ranks(tmp_path) > TARGET


def test_a_checkpoint_for_resuming_is_saved_without_a_warning(tmp_path: Path) -> None:
    model = adapted()
    train(model, adamw(model), steps=range(1, 5))
    with told() as messages:
        model.save_pretrained(tmp_path / "checkpoint-4")
    assert not messages


def test_ranks_made_final_early_stay_so_through_training_on_and_resuming(tmp_path: Path) -> None:
    model = adapted()
    optimizer = adamw(model)
    train(model, optimizer, steps=range(1, 5))
    model.finalize_ranks()
    ranks = model.rankwise_mask.clone()
    train(model, optimizer, steps=range(5, 7))
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, steps=range(7, STEPS + 1))

    resumed = rw.PeftModel.from_pretrained(nn.Sequential(*adapted().unload()), tmp_path, is_trainable=True)
    assert resumed.allocation_state.phase == "final" and resumed.allocation_state.step == 6
    optimizer = adamw(resumed)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, steps=range(7, STEPS + 1))
    assert torch.equal(resumed.rankwise_mask, ranks)
    assert same_run(resumed, model)


def test_ranks_can_be_made_final_before_the_first_step_and_with_no_known_length() -> None:
    model = adapted(total_step=None)
    model.finalize_ranks()
    assert [row.rank for row in model.rank_summary().layers] == [2, 2, 2]


def test_a_run_of_unknown_length_is_refused_at_its_first_step_before_anything_moves() -> None:
    model = adapted(total_step=None)
    optimizer = adamw(model)
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match=r"pass `total_step`, or call `set_total_step\(n\)`"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.set_total_step(STEPS)
    optimizer.zero_grad()
    train(model, optimizer)
    assert finished(model)


def test_a_run_that_prunes_nothing_needs_no_length() -> None:
    model = adapted(total_step=None, init_r=4, target_r=4)
    train(model, adamw(model))
    assert model.allocation_state.step == STEPS and model.rank_summary().total_rank == 12


# --- Transformers' Trainer -----------------------------------------------------------------------------------------


def language_run(
    folder: Path, callbacks: Any = (), steps: int = 8, arguments: Any = (), **changes: Any
) -> Any:
    from transformers import Trainer, TrainingArguments

    options = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "target_modules": ["q_proj", "v_proj"]}
    model = rw.get_peft_model(llama(), rw.AdaLoraConfig(**{**options, **changes}))
    data = [{"input_ids": ids, "labels": ids} for batch in token_batches(8) for ids in batch["input_ids"]]
    settings = {
        "max_steps": steps, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no",
        "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True, "logging_steps": 4,
    }  # fmt: skip
    trainer_arguments = TrainingArguments(str(folder), **{**settings, **dict(arguments)})
    return Trainer(model, trainer_arguments, train_dataset=data, callbacks=list(callbacks))


def test_the_trainer_accumulating_gradients_makes_one_step_of_several_batches(tmp_path: Path) -> None:
    trainer = language_run(tmp_path, steps=6, arguments={"gradient_accumulation_steps": 3})
    trainer.train()
    state = trainer.model.allocation_state
    assert state.step == state.total_step == trainer.state.global_step == 6
    assert state.reached_target


@pytest.mark.parametrize("event", ["on_optimizer_step", "on_step_end"])
def test_update_and_allocate_in_a_trainer_callback_keeps_control_and_counts_no_step_twice(
    event: str, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    steps = []

    def call(self: Any, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        model.update_and_allocate(state.global_step)
        steps.append(model.allocation_state.step)

    trainer = language_run(tmp_path, callbacks=[type("ByHand", (TrainerCallback,), {event: call})()])
    with told() as messages:
        trainer.train()
    first = 0 if event == "on_optimizer_step" else 1
    assert steps == list(range(first, 8 + first))
    assert trainer.model.allocation_state.reached_target
    assert not [message for message in messages if "gradient" in message]


def test_a_total_step_that_is_not_the_trainers_is_reported(tmp_path: Path) -> None:
    trainer = language_run(tmp_path, total_step=100, tfinal=20)
    with told() as messages:
        trainer.train()
    about = [message for message in messages if "total_step=100" in message]
    assert len(about) == 1 and "this Trainer runs 8" in about[0]


def test_a_trainers_run_that_ends_above_its_target_gives_a_warning(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    def stop(self: Any, args: Any, state: Any, control: Any, **unused: Any) -> None:
        control.should_training_stop = state.global_step == 3

    stopper = type("EarlyStopping", (TrainerCallback,), {"on_step_end": stop})()
    trainer = language_run(
        tmp_path, callbacks=[stopper], arguments={"save_strategy": "steps", "save_steps": 2}
    )
    with told() as messages:
        trainer.train()
    about = [message for message in messages if "finalize_ranks" in message]
    assert len(about) == 1 and "At step 3" in about[0]
    assert (tmp_path / "checkpoint-2").is_dir(), "of which nothing was said"
    with told() as messages:
        trainer.save_model(str(tmp_path / "final"))
    assert not messages, "it was told already"


@pytest.mark.parametrize("form", ["principal", True])
def test_a_step_inside_of_autocast_cuts_and_penalizes_in_full_precision(form: str | bool) -> None:
    def trained(inside: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = rw.get_peft_model(
            nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)),
            rw.AdaLoraConfig(
                init_r=6, target_r=3, total_step=8, tinit=1, tfinal=3, target_modules=["0", "2"],
                init_lora_weights=form,
            ),
        )  # fmt: skip
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        x = torch.randn(16, 12)
        for _ in range(8):
            model(x).square().mean().backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
            optimizer.zero_grad()
        return torch.cat(
            [model[0].delta_weight("default"), model.orthogonal_penalty().expand(1, 12)]
        ).detach()

    assert torch.equal(trained(inside=True), trained(inside=False))
