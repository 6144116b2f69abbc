"""State dictionaries under PEFT's names, and what PEFT's own functions say about a model with rankwise's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rankwise as rw


def layers() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"up": nn.Linear(6, 8), "conv": nn.Conv1d(3, 4, 2), "head": nn.Linear(8, 2)})


CONFIGS: dict[str, rw.LoraConfig] = {
    "lora": rw.LoraConfig(r=2, target_modules=["up", "conv"], init_lora_weights=False, bias="all"),
    "head": rw.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"], init_lora_weights=False),
    "adalora": rw.AdaLoraConfig(
        init_r=4, target_r=2, total_step=12, tinit=2, tfinal=4, target_modules=["up", "head"]
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_state_dictionaries_equal_a_files_contents_and_load_into_another_model(
    kind: str, tmp_path: Path
) -> None:
    model = rw.get_peft_model(layers(), CONFIGS[kind], "own")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path, training_state=False)
    tensors = rw.get_peft_model_state_dict(model, adapter_name="own")
    saved = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert tensors.keys() == saved.keys() and all(torch.equal(tensors[name], saved[name]) for name in saved)
    assert rw.get_peft_model_state_dict(model, model.state_dict(), "own").keys() == saved.keys()
    other = rw.get_peft_model(layers(), CONFIGS[kind])
    result = rw.set_peft_model_state_dict(other, tensors)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for name, value in rw.get_peft_model_state_dict(other).items():
        assert torch.equal(value, tensors[name]), name
    tensors[next(iter(tensors))].zero_()
    assert not all((p == 0).all() for p in model.parameters() if p.requires_grad), "they share no memory"


def test_a_run_goes_on_after_its_values_were_taken_and_given_back() -> None:
    def trained(exchange: bool) -> Any:
        model = rw.get_peft_model(layers(), CONFIGS["adalora"])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
        for _ in range(12):
            model["head"](torch.tanh(model["up"](x))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if exchange:
                rw.set_peft_model_state_dict(model, rw.get_peft_model_state_dict(model))
        return model

    plain, exchanged = trained(False), trained(True)
    assert exchanged.allocation_state == plain.allocation_state and plain.allocation_state.phase == "final"
    for name, value in rw.get_peft_model_state_dict(plain).items():
        assert torch.allclose(rw.get_peft_model_state_dict(exchanged)[name], value, atol=1e-6)


def test_values_of_a_run_in_which_layers_are_at_rank_0_come_back_and_none_may_be_missing() -> None:
    config = rw.AdaLoraConfig(
        init_r=4, target_r=0.5, total_step=6, tinit=1, tfinal=2, target_modules=["up", "head"]
    )
    model = rw.get_peft_model(layers(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        model["head"](torch.tanh(model["up"](x))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = rw.get_peft_model_state_dict(model)
    assert len(tensors) == 2, "one of the two layers is at rank 0"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rw.set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    whole = rw.get_peft_model(layers(), config)
    part = dict(list(rw.get_peft_model_state_dict(whole).items())[:2])
    with pytest.raises(ValueError, match="has no tensors of"):
        rw.set_peft_model_state_dict(whole, part)


def test_values_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    model = rw.get_peft_model(layers(), CONFIGS["lora"])
    before = rw.get_peft_model_state_dict(model)
    wrong: list[Any] = [
        {name: value[:1] for name, value in before.items()},
        dict(list(before.items())[:2]),
        {**before, "base_model.model.other.lora_A.weight": torch.zeros(2, 4)},
        {name: value * float("nan") for name, value in before.items()},
        {},
    ]
    for tensors in wrong:
        with pytest.raises(ValueError, match="[Tt]he state dictionary"):
            rw.set_peft_model_state_dict(model, tensors)
    for name, value in rw.get_peft_model_state_dict(model).items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="no adapter 'z'"):
        rw.get_peft_model_state_dict(model, adapter_name="z")
    with pytest.raises(TypeError, match="not a model that rankwise has adapted"):
        rw.get_peft_model_state_dict(layers())


def test_the_base_models_are_those_it_had() -> None:
    base = layers()
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    model = rw.get_peft_model(base, CONFIGS["head"])
    model.add_adapter(
        "run", CONFIGS["adalora"].__class__(init_r=4, target_r=2, total_step=12, target_modules=["conv"])
    )
    found = rw.get_base_model_state_dict(model)
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    rw.set_base_model_state_dict(model, {name: value + 1 for name, value in plain.items()})
    assert torch.equal(model["up"].weight, plain["up.weight"] + 1)
    with pytest.raises(RuntimeError, match=r"missing keys \['up\.weight'"):
        rw.set_base_model_state_dict(model, {"up.wait": torch.zeros(8, 6)})
    assert rw.set_base_model_state_dict(model, {}, strict=False).missing_keys == list(plain)
    fresh = layers()
    fresh.load_state_dict(found)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        rw.set_base_model_state_dict(model, plain)


@pytest.mark.parametrize("kind", CONFIGS)
def test_pefts_own_functions_name_those_to_call_instead_of_finding_nothing(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = rw.get_peft_model(layers(), CONFIGS[kind])
    with pytest.raises(TypeError, match=r"call `rankwise\.get_peft_model_state_dict`"):
        peft.get_peft_model_state_dict(model)
    with pytest.raises(TypeError, match=r"call `rankwise\.set_peft_model_state_dict`"):
        peft.set_peft_model_state_dict(model, rw.get_peft_model_state_dict(model))
    assert model.active_peft_config.is_prompt_learning is False


def test_wrapped_models_are_found() -> None:
    model = rw.get_peft_model(layers(), CONFIGS["head"])

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    assert rw.get_peft_model_state_dict(Wrapper()).keys() == rw.get_peft_model_state_dict(model).keys()
