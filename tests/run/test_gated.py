"""The gated form of AdaLoRA: it starts and learns as LoRA does, closes gates by their cost, and keeps LoRA's budget."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from tiny import llama, token_batches, told

TARGETS = ["q_proj", "v_proj", "down_proj"]  # of three different widths


def _config(**changes: Any) -> rw.AdaLoraConfig:
    options: dict[str, Any] = {
        "init_r": 6, "target_r": 2, "tinit": 5, "tfinal": 10, "total_step": 40, "lora_alpha": 8,
        "target_modules": TARGETS,
    }  # fmt: skip
    return rw.AdaLoraConfig(**{**options, **changes})


def _losses(model: nn.Module, steps: int = 40, rate: float = 1e-2, seed: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    losses = []
    for batch in token_batches(steps, seed):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _gates(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if ".lora_E." in name])


def _parameters_of_lora(rank: int) -> int:
    model = rw.get_peft_model(llama(), rw.LoraConfig(r=rank, target_modules=TARGETS))
    return int(model.get_nb_trainable_parameters()[0])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_with_nothing_to_prune_it_is_pefts_lora_number_for_number(use_rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    shared: dict[str, Any] = {"lora_alpha": 8, "target_modules": TARGETS, "use_rslora": use_rslora}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, **shared))
    ours = rw.get_peft_model(llama(), _config(init_r=4, target_r=4, use_rslora=use_rslora))
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            own[name.removeprefix("base_model.model.").replace(".weight", "")].data.copy_(parameter.data)
    torch.testing.assert_close(_losses(ours), _losses(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init_r", [2, 6, 12])
def test_the_scale_does_not_depend_on_the_ranks_to_spare(init_r: int) -> None:
    model = rw.get_peft_model(llama(), _config(init_r=init_r))
    layer = model.model.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B["default"])
    update = layer.delta_weight("default")
    torch.testing.assert_close(update, 8 / 2 * layer.lora_B["default"] @ layer.lora_A["default"])


def test_a_new_adapter_changes_nothing_and_its_gates_do_not_train() -> None:
    batch = token_batches(1)[0]
    model = llama()
    before = model(**batch).logits
    adapted = rw.get_peft_model(model, _config())
    assert torch.equal(adapted(**batch).logits, before)
    opened = _gates(adapted).clone()
    _losses(adapted, steps=5)
    assert torch.equal(_gates(adapted), opened)
    assert not [name for name, p in adapted.named_parameters() if ".lora_E." in name and p.requires_grad]


def test_importance_is_what_closing_a_gate_changes_by_the_gradient() -> None:
    model = rw.get_peft_model(llama(), _config(tinit=30, total_step=200, beta1=0.5, beta2=0.5)).double()
    sensitivity, uncertainty = 0.0, 0.0
    for batch in token_batches(3):
        for layer in (m for m in model.modules() if hasattr(m, "lora_E")):
            nn.init.normal_(layer.lora_B["default"])
            layer.lora_E["default"].requires_grad_(True)
        model(**batch).loss.backward()
        gates = [p for name, p in model.named_parameters() if ".lora_E." in name]
        effect = torch.cat([(p.detach() * p.grad).flatten() for p in gates]).abs()
        torch.optim.SGD([p for name, p in model.named_parameters() if ".lora_B." in name], lr=0.0).step()
        model.zero_grad()
        sensitivity = 0.5 * sensitivity + 0.5 * effect
        uncertainty = 0.5 * uncertainty + 0.5 * (effect - sensitivity).abs()
    torch.testing.assert_close(model.rankwise_sensitivity.double(), sensitivity, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.rankwise_uncertainty.double(), uncertainty, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("target_r", [1, 2, 4])
def test_it_ends_with_no_more_parameters_than_lora_of_the_target_rank(target_r: int) -> None:
    model = rw.get_peft_model(llama(), _config(target_r=target_r))
    _losses(model)
    summary = model.rank_summary()
    kept = summary.parameters - summary.total_rank  # without the gates, which do not train
    most = _parameters_of_lora(target_r)
    widest = max(row.parameters // row.rank for row in summary.layers if row.rank)
    assert most - widest < kept <= most
    assert len({row.rank for row in summary.layers}) > 1, "ranks should differ, or the test shows nothing"
    assert model.allocation_state.reached_target


def test_a_closed_gate_stays_closed() -> None:
    model = rw.get_peft_model(llama(), _config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    closed = torch.zeros_like(_gates(model), dtype=torch.bool)
    for batch in token_batches(40):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now = _gates(model) == 0
        assert (now | ~closed).all()
        closed = now
    assert closed.any() and not closed.all()


def test_a_run_of_one_form_is_not_taken_up_by_the_other() -> None:
    gated, paper = (rw.get_peft_model(llama(), _config(init_lora_weights=start)) for start in ("gated", True))
    state = copy.deepcopy(gated.state_dict())
    with pytest.raises((ValueError, RuntimeError), match="size mismatch|form=gated"):
        paper.load_state_dict(state)


def test_rslora_is_refused_in_the_papers_form_only() -> None:
    assert _config(use_rslora=True).use_rslora
    with pytest.raises(ValueError, match="'gated'"):
        _config(use_rslora=True, init_lora_weights=True)


def test_left_out_lora_alpha_grows_with_small_ranks_only() -> None:
    left_out = {"lora_alpha": None}
    ranks = (1, 2, 8, 64)
    assert [_config(init_r=r, target_r=r, **left_out).lora_alpha for r in ranks] == [4, 8, 32, 32]
    assert _config(use_rslora=True, **left_out).lora_alpha == 8
    assert _config(init_lora_weights=True, **left_out).lora_alpha == 8  # PEFT's


def test_left_out_lora_alpha_follows_a_changed_target_and_a_given_one_stays() -> None:
    config = _config(init_r=8, lora_alpha=None)
    assert replace(config, target_r=8).lora_alpha == 32
    config.target_r = 4
    assert config.lora_alpha == 16
    assert replace(_config(lora_alpha=8), target_r=4).lora_alpha == 8
    saved = rw.LoraConfig.from_dict(config.to_dict())
    assert type(config.to_dict()["lora_alpha"]) is int
    assert replace(saved, target_r=8).lora_alpha == 16, "what a run was trained with is no default any more"


def test_the_penalty_is_off_unless_asked_for() -> None:
    assert _config().orth_reg_weight == 0
    assert _config(init_lora_weights=True).orth_reg_weight == 0.5
    assert _config(orth_reg_weight=0.1).orth_reg_weight == 0.1


def test_a_file_of_peft_means_the_papers_form_and_ours_the_gated_one(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    peft.AdaLoraConfig(target_modules=TARGETS, total_step=40, init_r=6, target_r=2).save_pretrained(tmp_path)
    assert rw.AdaLoraConfig.from_pretrained(tmp_path).form.name == "paper"
    _config().save_pretrained(tmp_path)
    assert rw.AdaLoraConfig.from_pretrained(tmp_path) == _config()
    with told() as messages:
        assert peft.PeftConfig.from_pretrained(tmp_path).init_lora_weights == "gated"
    assert not messages


def test_an_adapter_with_layers_at_rank_0_is_loaded_and_trains_on(tmp_path: Any) -> None:
    model = rw.get_peft_model(llama(), _config(target_r=1))
    _losses(model)
    assert 0 in [row.rank for row in model.rank_summary().layers]
    model.save_pretrained(tmp_path)
    (tmp_path / "training_state.safetensors").unlink(missing_ok=True)
    again = rw.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    before = {name: p.detach().clone() for name, p in again.named_parameters() if ".lora_B." in name}
    _losses(again, steps=3)
    moved = [
        name for name, p in again.named_parameters() if name in before and not torch.equal(p, before[name])
    ]
    assert 0 < len(moved) < len(before)
