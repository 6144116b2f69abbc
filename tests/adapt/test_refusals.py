"""Refusals of `adapt_ranks`: they name the reason and the remedy, and come before anything has changed."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import rankwise as rw
from lora_world import base, with_lora


def untouched(model: Any, before: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_alpha": 0}, "'0': the adapter's scale, which `lora_alpha`"),
        ({"alpha_pattern": {"2": float("inf")}}, "'2': the adapter's scale, which `lora_alpha`"),
    ],
)
def test_adapters_whose_meaning_would_change_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    model = with_lora("linear", base("linear", torch.float32), **changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=named):
        rw.adapt_ranks(model, target_r=2, total_step=10)
    assert untouched(model, before)
    assert model.base_model.model[0].scaling["default"] == (2.0 if changes.get("lora_alpha", 8) else 0.0)


def test_loftq_is_refused() -> None:
    model = with_lora("linear")
    model.peft_config["default"].init_lora_weights = "loftq"
    with pytest.raises(ValueError, match="loftq"):
        rw.adapt_ranks(model, target_r=2, total_step=10)


def test_variants_that_read_the_factors_differently_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[1, 2]
    )
    with pytest.raises(ValueError, match="ALora"):
        rw.adapt_ranks(peft.get_peft_model(model, config), target_r=2, total_step=10)


def test_grouped_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(ValueError, match="groups"):
        rw.adapt_ranks(adapted, target_r=2, total_step=10)


def test_an_encoder_whose_fast_path_would_evaluate_without_the_adapter_is_refused() -> None:
    config = peft.LoraConfig(r=4, target_modules=["linear1", "linear2"], init_lora_weights=False)
    model = peft.get_peft_model(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), config)
    x = torch.randn(2, 5, 16)
    trained = model(x)
    assert not torch.allclose(model.eval()(x), trained)

    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        rw.adapt_ranks(model, target_r=2, total_step=10)

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        rw.adapt_ranks(model, target_r=2, total_step=10)
        torch.testing.assert_close(model(x), trained)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_first": False},
        {"batch_first": True, "activation": nn.functional.silu},
        {"batch_first": True, "bias": False},
        {"batch_first": True, "nhead": 1},
    ],
)
def test_an_encoder_without_a_fast_path_is_adapted(settings: dict[str, Any]) -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(**{"d_model": 16, "nhead": 4, "dropout": 0.0, **settings})
    config = peft.LoraConfig(r=4, target_modules=["linear1", "linear2"], init_lora_weights=False)
    model = peft.get_peft_model(layer, config)
    x = torch.randn(2, 5, 16)
    rw.adapt_ranks(model, target_r=2, total_step=10)
    trained = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)


def test_shared_factors_are_refused() -> None:
    model = with_lora("linear", target_modules=["2", "4"])
    layers = model.base_model.model
    layers[4].lora_A["default"].weight = layers[2].lora_A["default"].weight
    with pytest.raises(ValueError, match=r"'2' and '4' share their factor A"):
        rw.adapt_ranks(model, target_r=2, total_step=10)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (peft.AdaLoraConfig(target_modules=["0"], total_step=10), "ADALORA"),
        (peft.IA3Config(target_modules=["0"], feedforward_modules=[]), "IA3"),
    ],
)
def test_other_kinds_of_adapters_are_named(config: Any, named: str) -> None:
    model = peft.get_peft_model(base("linear", torch.float32), config)
    with pytest.raises(ValueError, match=named):
        rw.adapt_ranks(model, target_r=2, total_step=10)


def test_a_model_without_an_adapter_is_refused_with_the_way_to_get_one() -> None:
    with pytest.raises(ValueError, match=r"has no adapter.*get_peft_model"):
        rw.adapt_ranks(base("linear"), target_r=2)
    with pytest.raises(TypeError, match="FactorPairs"):
        rw.adapt_ranks("model", target_r=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="FactorPairs"):
        rw.adapt_ranks([], target_r=2)


def test_rankwises_own_layers_adapt_already() -> None:
    config = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["0"])
    model = rw.get_peft_model(base("linear"), config)
    with pytest.raises(ValueError, match="adapt by themselves"):
        rw.adapt_ranks(model)


def test_rankwises_own_layers_of_fixed_rank_are_named() -> None:
    model = rw.get_peft_model(base("linear"), rw.LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"whose ranks are fixed.*AdaLoraConfig"):
        rw.adapt_ranks(model)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"target_r": "8"}, TypeError),
        ({"target_r": 0}, ValueError),
        ({"deltaT": 0}, ValueError),
        ({"tinit": -1}, ValueError),
        ({"tinit": 1.5}, ValueError),
        ({"tinit": 0.6, "tfinal": 0.6}, ValueError),
    ],
)
def test_the_callback_refuses_numbers_of_no_run_when_it_is_made(
    settings: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=next(iter(settings))):
        rw.AdaptRanks(**settings)


def test_a_second_run_on_the_same_adapter_is_refused() -> None:
    model = with_lora("linear")
    rw.adapt_ranks(model, target_r=2, total_step=10)
    with pytest.raises(ValueError, match="detach"):
        rw.adapt_ranks(model, target_r=2, total_step=10)


def test_merged_adapters_are_refused() -> None:
    model = with_lora("linear")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        rw.adapt_ranks(model, target_r=2, total_step=10)


def test_a_missing_or_ambiguous_adapter_is_named() -> None:
    model = with_lora("linear")
    with pytest.raises(ValueError, match=r"no adapter 'sft'.*'default'"):
        rw.adapt_ranks(model, target_r=2, total_step=10, adapter="sft")
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="say which one"):
        rw.adapt_ranks(model, target_r=2, total_step=10)


@pytest.mark.parametrize(
    ("settings", "kind", "named"),
    [
        ({"target_r": 5}, ValueError, r"`target_r`=5 is greater than the adapter's rank, which is 4"),
        ({"target_r": 0}, ValueError, "target_r"),
        ({"target_r": "8"}, TypeError, "target_r"),
        ({"target_r": True}, TypeError, "target_r"),
        ({"target_r": 0.1}, ValueError, "no rank at all"),
        ({"total_step": 0}, ValueError, "total_step"),
        ({"tinit": 8, "tfinal": 8}, ValueError, "tinit"),
        ({"deltaT": 0}, ValueError, "deltaT"),
        ({"tinit": -1}, ValueError, "tinit"),
    ],
)
def test_impossible_settings_of_a_run_are_refused(
    settings: dict[str, Any], kind: type[Exception], named: str
) -> None:
    model = with_lora("linear")
    with pytest.raises(kind, match=named):
        rw.adapt_ranks(model, **{"target_r": 2, "total_step": 10, **settings})
    assert model.base_model.model[0].scaling["default"] == 2.0
    rw.adapt_ranks(model, target_r=2, total_step=10)  # the first attempt has left nothing behind


def test_a_run_of_unknown_length_does_not_begin() -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=r"`set_total_step\(n\)`.*`rankwise.AdaptRanks`"):
        optimizer.step()
    ranks.set_total_step(20)
    optimizer.step()


def test_the_state_of_another_run_is_refused_and_changes_nothing() -> None:
    one = rw.adapt_ranks(with_lora("linear"), target_r=2, total_step=10)
    other = rw.adapt_ranks(with_lora("embedding"), target_r=2, total_step=10)
    with pytest.raises(ValueError, match="not the state of a run on these layers"):
        one.load_state_dict(other.state_dict())
    longer = rw.adapt_ranks(with_lora("linear"), target_r=2, total_step=20)
    with pytest.raises(ValueError, match="total_step"):
        one.load_state_dict(longer.state_dict())
    assert one.allocation_state.total_step == 10


def test_an_optimizer_that_steps_inside_the_backward_pass_is_refused() -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=2, total_step=10, tinit=1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            optimizer = torch.optim.SGD([parameter], lr=0.1)
            parameter.register_post_accumulate_grad_hook(lambda _, own=optimizer: own.step())  # type: ignore[misc]
    with pytest.raises(ValueError, match="inside the backward pass"):
        model(torch.randn(4, 8, dtype=torch.float64)).sum().backward()
    assert ranks.allocation_state.step == 0
