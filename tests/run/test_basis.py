"""Rewriting layers in their principal bases: updates stay the same, and optimizers' states follow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.run.basis import PrincipalBases, mean_strengths

WIDTHS = (7, 9, 7)


def _model(**changes: Any) -> Any:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(*WIDTHS[:2]), nn.Tanh(), nn.Linear(*WIDTHS[1:]))
    options: dict[str, Any] = {
        "init_r": 4,
        "target_r": 2,
        "tinit": 5,
        "total_step": 20,
        "target_modules": ["0", "2"],
    }
    model = rw.get_peft_model(layers.double(), rw.AdaLoraConfig(**{**options, **changes}))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)
    return model


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _layers(model: Any) -> list[Any]:
    return [model[0], model[2]]


def _pull(model: Any) -> list[Tensor]:
    """Set the gradients of A and B to those of ``<G, B A>`` for a fixed G in each layer. Return all G."""
    torch.manual_seed(1)
    pulls = [
        torch.randn(layer.out_features, layer.in_features, dtype=torch.float64) for layer in _layers(model)
    ]
    for layer, G in zip(_layers(model), pulls, strict=True):
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        A.grad, B.grad = B.detach().T @ G, G @ A.detach().T
    return pulls


def _write(model: Any, louder: dict[int, float], optimizers: list[torch.optim.Optimizer]) -> None:
    """Write all bases, and keep every rank."""
    factors = model._rankwise_controller.factors
    with torch.no_grad():
        PrincipalBases(factors).write(torch.ones_like(factors.mask), louder, optimizers)


@pytest.mark.parametrize(
    ("make", "name", "share"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9), "momentum_buffer", 1.0),
        (lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.0), "exp_avg", 0.1),
        (lambda p: torch.optim.Adam(p, lr=0.0, foreach=True), "exp_avg", 0.1),
        (lambda p: torch.optim.AdamW(p, lr=0.0, fused=True), "exp_avg", 0.1),
    ],
)
def test_means_of_gradients_become_those_of_the_turned_factors(
    make: Callable[[Any], torch.optim.Optimizer], name: str, share: float
) -> None:
    model = _model()
    optimizer = make(_trained(model))
    pulls = _pull(model)
    optimizer.step()
    before = [layer.delta_weight("default") for layer in _layers(model)]
    louder = {0: 2.0, 1: 0.5}
    _write(model, louder, [optimizer])
    for layer, G, by, update in zip(_layers(model), pulls, louder.values(), before, strict=True):
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        torch.testing.assert_close(by * layer.delta_weight("default"), update)
        # this gradient may wait for another optimizer
        torch.testing.assert_close(A.grad, by * (B.T @ G).detach())
        torch.testing.assert_close(B.grad, by * (G @ A.T).detach())
        # The scale multiplies both gradients by `by`. It has not been changed here.
        torch.testing.assert_close(optimizer.state[A][name], share * by * (B.T @ G).detach())
        torch.testing.assert_close(optimizer.state[B][name], share * by * (G @ A.T).detach())


def test_means_of_squares_stay_positive_and_of_the_size_of_the_turned_gradients() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(_trained(model), lr=0.0, amsgrad=True)
    for _ in range(3):
        _pull(model)
        optimizer.step()
    _write(model, {0: 1.0, 1: 1.0}, [optimizer])
    for layer in _layers(model):
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            for name in ("exp_avg_sq", "max_exp_avg_sq"):
                assert bool((optimizer.state[factor][name] >= 0).all())
                assert optimizer.state[factor][name].any()


def test_momentum_of_rmsprop_is_movement_and_moves_the_update_as_before() -> None:
    model = _model()
    optimizer = torch.optim.RMSprop(_trained(model), lr=0.0, momentum=0.9)
    for _ in range(3):
        _pull(model)
        optimizer.step()

    def movements() -> list[Tensor]:
        found = []
        for layer in _layers(model):
            A, B = layer.lora_A["default"], layer.lora_B["default"]
            moved_A, moved_B = (optimizer.state[p]["momentum_buffer"] for p in (A, B))
            found += [(B @ moved_A).detach(), (moved_B @ A).detach()]
        return found

    before, louder = movements(), {0: 2.0, 1: 0.5}
    _write(model, louder, [optimizer])
    for was, now, by in zip(before, movements(), (2.0, 2.0, 0.5, 0.5), strict=True):
        torch.testing.assert_close(by * now, was)


def test_variances_of_centered_rmsprop_stay_positive() -> None:
    model = _model()
    optimizer = torch.optim.RMSprop(_trained(model), lr=0.0, alpha=0.5, centered=True)
    for _ in range(
        12
    ):  # the gradients are nearly the same, so that mean squares are hardly larger than squared means
        _pull(model)
        optimizer.step()
    _write(model, {0: 1.0, 1: 1.0}, [optimizer])
    for factor in _trained(model):
        state = optimizer.state[factor]
        assert state["grad_avg"].any()
        assert bool((state["square_avg"] - state["grad_avg"].square() >= -1e-12).all())


class Quantized(torch.optim.SGD):
    """Keeps a gradient as bytes, as 8-bit optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("state1", torch.ones_like(parameter, dtype=torch.uint8))
        return super().step(closure)


def test_state_that_cannot_be_rewritten_is_reset_only_for_rewritten_factors() -> None:
    model = _model()
    other = nn.Parameter(torch.zeros(3, 3))
    optimizer = Quantized([*_trained(model), other], lr=0.0)
    _pull(model)
    optimizer.step()
    _write(model, {0: 1.0, 1: 1.0}, [optimizer])
    assert list(optimizer.state) == [other]


def _optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    return {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "Adam, foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
        "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-1),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9),
        "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    }


@pytest.mark.parametrize("name", list(_optimizers()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_meets_its_budget_and_learns_with_every_optimizer(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    config = rw.AdaLoraConfig(
        init_r=6, target_r=2, tinit=4, tfinal=20, total_step=60, target_modules=["0", "2"]
    )
    model = rw.get_peft_model(model, config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    optimizer = _optimizers()[name](_trained(model))
    x, y = torch.randn(64, 12, dtype=dtype), torch.randn(64, 12, dtype=dtype)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    summary = model.rank_summary()
    assert summary.parameters <= 2 * 2 * (12 + 16)
    assert losses[-1] < losses[0] and all(loss == loss for loss in losses)


def test_with_enough_rank_to_keep_everything_cutting_changes_no_output() -> None:
    """The update has rank 2, and 2 of 4 ranks stay, so the cut must not lose anything."""
    model = _model(tinit=0, tfinal=19)
    for layer in _layers(model):
        B = layer.lora_B["default"]
        B.data[:, 2:] = B.data[:, :2]
        layer.lora_A["default"].data[2:] *= 0
    x = torch.randn(5, WIDTHS[0], dtype=torch.float64)
    before = model(x).detach()
    model.finalize_ranks()
    assert model.rank_summary().total_rank == 4
    torch.testing.assert_close(model(x), before)


def test_a_layer_that_does_not_train_keeps_its_ranks_its_basis_and_its_scale() -> None:
    model = _model()
    first = model[0]
    for parameter in (first.lora_A["default"], first.lora_B["default"]):
        parameter.requires_grad_(False)
    before = {key: value.detach().clone() for key, value in first.state_dict().items() if "lora_" in key}
    scale = first.scaling["default"]
    model.finalize_ranks()
    assert first.scaling["default"] == scale != model[2].scaling["default"]
    assert {row.path: row.rank for row in model.rank_summary().layers} == {"0": 4, "2": 2}
    assert all(torch.equal(first.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("pruned", [[], [1, 2, 5]])
def test_the_mean_strength_needs_no_singular_values(pruned: list[int]) -> None:
    model = _model()
    factors = model._rankwise_controller.factors
    factors.mask[pruned] = False
    acts = factors.mask.view(2, 4)
    with torch.no_grad():
        strengths = PrincipalBases(factors).strengths().view(2, 4)
        found = mean_strengths(factors).view(2, 4)
    means = (strengths.square().sum(1, keepdim=True) / acts.sum(1, keepdim=True)).sqrt()
    torch.testing.assert_close(found, means * acts)
    importance = [row.importance for row in model.rank_summary().layers]
    scale = model[0].scaling["default"]
    assert importance == pytest.approx(((scale * found).sqrt().sum(1) / 16 ** (2 / 3)).tolist())


def test_a_layer_that_is_not_finite_is_worth_nothing() -> None:
    model = _model()
    model[0].lora_B["default"].data[0, 0] = torch.nan
    first, second = (row.importance for row in model.rank_summary().layers)
    assert first == 0 and second > 0
