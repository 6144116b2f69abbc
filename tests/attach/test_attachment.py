"""Adapters are attached completely or not at all, and are removed without a trace."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.attach.attachment import (
    adapter_layers,
    apply_attachment,
    base_scaling,
    bias_names,
    check_adapter_name,
    detach,
    detach_all,
    plain_name,
    plan_attachment,
)
from rankwise.config import AdaLoraConfig, LoraConfig


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"], **changes})


def seen(model: nn.Module) -> dict[str, Any]:
    """Classes, names and values of all parts, and which parameters train."""
    return {
        **{f"class {path}": type(module) for path, module in model.named_modules()},
        **{name: value.clone() for name, value in model.state_dict().items()},
        **{f"trains {name}": parameter.requires_grad for name, parameter in model.named_parameters()},
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def test_a_rank_pattern_on_a_new_adapter_is_reported_to_have_no_effect() -> None:
    ranks = {"0.lora_E": [True, False, False, False]}
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["0"], rank_pattern=ranks)
    with pytest.warns(UserWarning, match="`rank_pattern` .* has no effect on adapter 'one'.*start at rank 4"):
        attachment = plan_attachment(block(), config, "one")
    assert attachment.config.rank_pattern is None and config.rank_pattern == ranks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_attachment(block(), attachment.config, "one")


def test_a_plan_changes_nothing_and_an_attached_adapter_comes_out_without_a_trace() -> None:
    model = block()
    before = seen(model)
    attachment = plan_attachment(model, lora(), "one")
    assert same(seen(model), before)
    apply_attachment(model, attachment)
    assert list(adapter_layers(model)) == ["0", "2"] and not same(seen(model), before)
    assert not any(
        parameter.requires_grad for name, parameter in model.named_parameters() if "lora" not in name
    )
    detach(model, "one")
    after = seen(model)
    frozen = {name: False for name in before if name.startswith("trains")}
    assert same(after, {**before, **frozen})


def test_one_of_two_adapters_can_be_removed_and_the_other_stays() -> None:
    model = block()
    apply_attachment(model, plan_attachment(model, lora(), "one"))
    apply_attachment(model, plan_attachment(model, lora(target_modules=["2"]), "two"))
    assert list(adapter_layers(model, "two")) == ["2"]
    detach(model, "one")
    assert list(adapter_layers(model)) == ["2"] and type(model[0]) is nn.Linear
    detach_all(model)
    assert not adapter_layers(model)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_fresh_lora_update_has_pefts_scale(use_rslora: bool) -> None:
    config = lora(use_rslora=use_rslora, alpha_pattern={"2": 10}, rank_pattern={"2": 4})
    layers = plan_attachment(block(), config, "one").layers
    expected = [6 / 3**0.5, 10 / 4**0.5] if use_rslora else [6 / 3, 10 / 4]
    assert [factors.scaling for factors in layers.values()] == pytest.approx(expected, rel=1e-12)
    assert [tuple(factors.A.shape) for factors in layers.values()] == [(3, 6), (4, 5)]
    assert [tuple(factors.B.shape) for factors in layers.values()] == [(5, 3), (4, 4)]


@pytest.mark.parametrize("init_r", [2, 4])
def test_the_scale_at_the_start_is_loras_at_the_initial_rank(init_r: int) -> None:
    config = AdaLoraConfig(init_r=init_r, target_r=2, lora_alpha=8, total_step=9, target_modules=["0"])
    (factors,) = plan_attachment(block(), config, "one").layers.values()
    assert factors.E is None
    assert factors.scaling == 8 / init_r


def test_adaloras_own_scale_is_that_of_the_initial_rank_however_many_stay() -> None:
    config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=9, init_lora_weights=True)
    assert base_scaling(config, "any", 4) == base_scaling(config, "any", 1) == 8 / (4 + 1e-5)


def test_the_start_is_made_for_the_layers_dtype_but_no_narrower_than_float32() -> None:
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        layers = plan_attachment(block().to(dtype), lora(), "one").layers
        assert {factors.A.dtype for factors in layers.values()} == {expected}


@pytest.mark.parametrize(
    ("bias", "expected"), [("none", []), ("lora_only", ["0.bias"]), ("all", ["0.bias", "2.bias"])]
)
def test_biases_are_those_of_the_adapted_layers_or_all(bias: str, expected: list[str]) -> None:
    assert list(bias_names(block(), bias, ["0"], [])) == expected
    assert "2.bias" not in list(bias_names(block(), bias, ["0"], heads=["2"]))


def test_a_rank_that_could_only_fill_the_memory_is_refused_with_the_most_that_is_taken() -> None:
    with pytest.raises(ValueError, match="Rank 1025 is too large for '0'.*6 inputs and 5 outputs.*1024"):
        plan_attachment(block(), lora(r=1025, target_modules=["0"]), "one")


@pytest.mark.parametrize("name", ["", "a.b", "keys"])
def test_names_that_no_module_can_have_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="can't name an adapter"):
        check_adapter_name(block(), name)


def test_wrappers_of_other_libraries_are_no_part_of_a_name() -> None:
    assert plain_name("_orig_mod.layers.0._checkpoint_wrapped_module.q.weight") == "layers.0.q.weight"
