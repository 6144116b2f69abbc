"""Adapters by name: adding, activating, training, deleting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from block_world import X, adalora, assert_same, block, lora, snapshot, train, two_adapters


def test_both_orders_of_arguments_add_an_adapter() -> None:
    model = rw.get_peft_model(block(), lora())
    model.add_adapter("peft", lora())
    model.add_adapter(lora(), "transformers")
    model.add_adapter(adapter_name="named", peft_config=lora())
    assert list(model.peft_config) == ["default", "peft", "transformers", "named"]
    assert model.active_adapters == ["default"] and model.active_adapter == "default"
    for wrong in ((3, lora()), ("text", "text"), (lora(), lora())):
        with pytest.raises(TypeError, match="name and a"):
            model.add_adapter(*wrong)


@pytest.mark.parametrize("name", ["", "with.dot", "keys", "default"])
def test_names_that_cannot_be_or_are_taken_are_refused(name: str) -> None:
    model = rw.get_peft_model(block(), lora())
    before = snapshot(model)
    with pytest.raises(ValueError, match="can't name|already"):
        model.add_adapter(name, lora())
    assert_same(before, snapshot(model))


def test_one_adapter_or_several_act() -> None:
    model, outputs = two_adapters()
    hidden = model.body.relu(model.body.first(X))
    other = model.body.second.delta_weight("other")
    for names in (["default", "other"], ["other", "default"], ["default", "other", "default"]):
        model.set_adapter(names)
        assert model.active_adapters == list(dict.fromkeys(names))
        expected = model.head(model.body.second(hidden))
        torch.testing.assert_close(model(X), expected)
    model.set_adapter("default")
    both = model.head(model.body.second(hidden) + hidden @ other.T)
    model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(X), both)
    for name in ("other", "default"):
        model.set_adapter(name)
        assert torch.equal(model(X), outputs[name]) and model.active_adapters == [name]
    with pytest.raises(ValueError, match="no adapter 'third'.*default"):
        model.set_adapter("third")


def test_only_the_acting_adapter_trains() -> None:
    model, _ = two_adapters()

    def trains() -> set[str]:
        return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}

    assert trains() == {"default"}
    model.set_adapter("other")
    assert trains() == {"other"}
    model.set_adapter(["other", "default"])
    assert trains() == {"other", "default"}
    model.set_adapter("other", inference_mode=True)
    assert trains() == set()


def test_adding_an_adapter_does_not_change_which_parameters_train() -> None:
    model = rw.get_peft_model(block(), lora(target_modules=["second"]))
    model.head.weight.requires_grad_(True)
    model.body.second.lora_A["default"].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_adapter("other", lora(target_modules=["first", "second"]))
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before.keys())
    assert torch.equal(model.body.first(X), nn.Linear.forward(model.body.first, X))


def test_copies_of_a_module_follow_the_acting_adapter() -> None:
    model = rw.get_peft_model(block(), lora(modules_to_save=["head"]))
    model.add_adapter("other", lora(modules_to_save=["head"]))
    model.add_adapter("plain", lora())
    with torch.no_grad():
        model.head.modules_to_save["default"].bias.fill_(5.0)
        model.head.modules_to_save["other"].bias.fill_(-5.0)
    for name, sign in (("default", 1), ("other", -1)):
        model.set_adapter(name)
        assert (model.head(X) * sign > 0).all()
        assert model.head.modules_to_save[name].weight.requires_grad
        assert not dict(model.named_parameters())["head.weight"].requires_grad
    model.set_adapter("plain")
    assert torch.equal(model.head(X), block().head(X))
    model.set_adapter(["plain", "other"])
    assert (model.head(X) < 0).all()
    before = model.active_adapters
    with pytest.raises(ValueError, match="'head'"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == before
    model.set_adapter("default")
    with model.disable_adapter():
        assert torch.equal(model(X), block()(X))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_modules": ["head", "first"]}, {"modules_to_save": ["head"]}),
        ({"modules_to_save": ["head"]}, {"target_modules": ["head", "first"]}),
        ({"target_modules": ["head"], "modules_to_save": ["body"]}, {"target_modules": ["first"]}),
        ({"target_modules": ["first"]}, {"target_modules": ["head"], "modules_to_save": ["body"]}),
        ({"target_modules": ["head"], "modules_to_save": ["first"]},
         {"target_modules": ["head"], "modules_to_save": ["body"]}),
    ],
    ids=["adapted-then-saved", "saved-then-adapted", "adapted-inside", "saved-around", "nested"],
)  # fmt: skip
def test_adapters_that_treat_a_module_differently_are_refused(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    rw.get_peft_model(block(), lora(**second)).save_pretrained(tmp_path)
    model = rw.get_peft_model(block(), lora(**first))
    expected, before = model(X), snapshot(model)
    with pytest.raises(ValueError, match="'second'.*modules_to_save"):
        model.add_adapter("second", lora(**second))
    with pytest.raises(ValueError):
        model.load_adapter(tmp_path, "second")
    assert_same(before, snapshot(model))
    assert torch.equal(model(X), expected)


def test_disabling_nests_and_survives_exceptions() -> None:
    model, outputs = two_adapters()
    with model.disable_adapter():
        assert torch.equal(model(X), outputs["base"])
        with model.disable_adapter():
            assert torch.equal(model(X), outputs["base"])
        assert torch.equal(model(X), outputs["base"]), "the inner context must not enable again"
        model.add_adapter("third", lora(target_modules=["first", "head"]))
        assert torch.equal(model(X), outputs["base"]), "nor must a new adapter"
    assert torch.equal(model(X), outputs["default"])
    with pytest.raises(RuntimeError, match="mine"), model.disable_adapter():
        raise RuntimeError("mine")
    assert torch.equal(model(X), outputs["default"])
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(model(X), outputs["base"]), "what was off before the context is off after it"
    model.enable_adapter_layers()
    assert torch.equal(model(X), outputs["default"])


def test_biases_belong_to_one_adapter_and_a_warning_says_that_they_stay() -> None:
    model = rw.get_peft_model(block(), lora(bias="all"))
    assert model.head.bias.requires_grad
    model.add_adapter("other", lora())
    with pytest.raises(ValueError, match="'default'.*bias"):
        model.add_adapter("third", lora(bias="lora_only"))
    assert list(model.peft_config) == ["default", "other"]
    model.set_adapter("other")
    assert not model.head.bias.requires_grad, "the biases are those of an adapter that does not act"
    model.set_adapter("default")
    assert model.head.bias.requires_grad
    with pytest.warns(UserWarning, match="biases"), model.disable_adapter():
        pass


def test_deleting_an_adapter_hands_over_to_another() -> None:
    model, outputs = two_adapters()
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and list(model.peft_config) == ["other"]
    assert torch.equal(model(X), outputs["other"])
    assert type(model.body.first) is nn.Linear, "no adapter is left there"
    assert all("default" not in name for name, _ in model.named_parameters())
    assert model.body.second.lora_A["other"].requires_grad
    model.delete_adapter("other")
    assert torch.equal(model(X), outputs["base"]) and model.active_adapters == []
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.delete_adapter("other")
    model.add_adapter("again", lora())
    assert model.active_adapters == ["again"]


def test_deleting_the_adalora_adapter_lets_another_train() -> None:
    model = rw.get_peft_model(block(), adalora())
    with pytest.raises(ValueError, match="'default' trains already"):
        model.add_adapter("second", adalora())
    assert list(model.peft_config) == ["default"]
    model.add_adapter("idle", adalora(inference_mode=True))
    model.delete_adapter("default")
    assert model.allocation_state is None
    model.add_adapter("second", adalora())
    model.set_adapter("second")
    train(model, 12)
    assert model.allocation_state.reached_target
    assert {row.init_r for row in model.rank_summary().layers} == {4}


def test_get_peft_model_on_an_adapted_model_adds_and_sets() -> None:
    model = rw.get_peft_model(block(), lora())
    assert rw.get_peft_model(model, adalora(), adapter_name="ranks") is model
    assert model.active_adapters == ["ranks"] and list(model.peft_config) == ["default", "ranks"]
    with pytest.raises(ValueError, match="'ranks' already"):
        rw.get_peft_model(model, lora(), adapter_name="ranks")
