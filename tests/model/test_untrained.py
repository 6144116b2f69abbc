"""Warnings about training that leaves all adapters out, given before anything is lost."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def lora(**fields: Any) -> rw.LoraConfig:
    return rw.LoraConfig(**{"r": 2, "target_modules": ["0"], **fields})


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    model(torch.ones(2, 4)).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(each.message) for each in caught if "doesn't train the adapter" in str(each.message)]


def test_an_optimizer_that_was_made_before_the_adapter_is_reported_once() -> None:
    base = layers()
    early = torch.optim.SGD(base.parameters(), lr=0.1)
    model = rw.get_peft_model(base, lora())
    (message,) = step(model, early)
    assert "Build the optimizer after `get_peft_model`" in message
    assert step(model, early) == []
    right = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert step(model, right) == []
    assert len(step(model, torch.optim.SGD([base[0].weight], lr=0.1))) == 1


def test_optimizers_that_train_something_else_are_not_reported() -> None:
    model, other = rw.get_peft_model(layers(), lora()), layers()
    assert step(other, torch.optim.SGD(other.parameters(), lr=0.1)) == []
    assert step(model, torch.optim.SGD(model.parameters(), lr=0.1)) == []
    model[0].weight.requires_grad_(True)  # it trains in addition to the adapter, in an optimizer of its own
    assert step(model, torch.optim.SGD([model[0].weight], lr=0.1)) == []
    plain = model.unload()
    assert step(plain.requires_grad_(True), torch.optim.SGD(plain.parameters(), lr=0.1)) == []


def test_an_adapted_model_is_not_kept_alive_by_being_watched() -> None:
    import gc
    import weakref

    model = rw.get_peft_model(layers(), lora())
    alive = weakref.ref(model)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("adalora", [False, True])
def test_training_an_adapter_that_was_loaded_for_inference_is_reported(adalora: bool, tmp_path: Path) -> None:
    own = rw.AdaLoraConfig(target_modules=["0"], init_r=4, target_r=2, total_step=20) if adalora else lora()
    rw.get_peft_model(layers(), own).save_pretrained(tmp_path)
    frozen = rw.PeftModel.from_pretrained(layers(), tmp_path)
    with pytest.warns(UserWarning, match=r"Nothing of this model trains.*is_trainable=True\)`\.$"):
        assert frozen.train() is frozen and frozen.training
    with pytest.raises(RuntimeError, match="element 0"):
        frozen(torch.ones(2, 4)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen.eval()
        frozen.train(False)
        rw.PeftModel.from_pretrained(layers(), tmp_path, is_trainable=True).train()
        rw.get_peft_model(layers(), lora()).train()


def test_an_idle_adapter_that_could_train_is_named_where_the_active_one_cannot(tmp_path: Path) -> None:
    model = rw.get_peft_model(layers(), lora())
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "old")
    model.set_adapter("old")
    with pytest.warns(
        UserWarning, match=r"active adapters \['old'\] .* activate 'default' with `set_adapter`"
    ):
        model.train()
