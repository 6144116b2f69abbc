"""The default form: it starts and learns as LoRA does, cuts principal directions, and keeps LoRA's budget."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from tiny import llama, token_batches, told

TARGETS = ["q_proj", "v_proj", "down_proj"]  # layers of three different widths


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


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init_r", [2, 6, 12])
def test_layers_are_scaled_as_lora_of_their_average_rank_and_in_the_end_exactly_of_the_target(
    init_r: int, use_rslora: bool
) -> None:
    model = rw.get_peft_model(llama(), _config(init_r=init_r, use_rslora=use_rslora))
    for steps, when in ((0, "at the start"), (20, "between two cuts"), (20, "in the end")):
        _losses(model, steps=steps)
        rows = model.rank_summary().layers
        widths = {row.path: sum(model.get_submodule(row.path).weight.shape) for row in rows}
        average = sum(row.rank * widths[row.path] for row in rows) / sum(widths.values())
        average = 2 if when == "in the end" else average
        for row in rows:
            path, rank = row.path, row.rank
            layer = model.get_submodule(path)
            assert layer.scaling["default"] == pytest.approx(8 / average ** (0.5 if use_rslora else 1)), when
            A, B = (getattr(layer, key)["default"].detach() for key in ("lora_A", "lora_B"))
            expected = layer.scaling["default"] * B[:, :rank] @ A[:rank]
            torch.testing.assert_close(
                layer.delta_weight("default"), expected, rtol=1e-4, atol=1e-6, msg=when
            )


def test_a_new_adapter_changes_nothing_and_is_plain_lora() -> None:
    batch = token_batches(1)[0]
    model = llama()
    before = model(**batch).logits
    adapted = rw.get_peft_model(model, _config())
    assert torch.equal(adapted(**batch).logits, before)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert not [name for name in adapted.state_dict() if "lora_E" in name]


@pytest.mark.parametrize("target_r", [1, 2, 4])
def test_it_ends_with_no_more_parameters_than_lora_of_the_target_rank(target_r: int) -> None:
    model = rw.get_peft_model(llama(), _config(target_r=target_r))
    _losses(model)
    summary = model.rank_summary()
    most = _parameters_of_lora(target_r)
    widest = max(row.parameters // row.rank for row in summary.layers if row.rank)
    assert most - widest < summary.parameters <= most
    assert len({row.rank for row in summary.layers}) > 1, "ranks should differ, or the test shows nothing"
    assert model.allocation_state.reached_target


def _rows(model: Any, key: str) -> torch.Tensor:
    """For each rank of all layers, whether its row of A or its column of B holds anything but zeros."""
    factors = [p.detach() for name, p in model.named_parameters() if f".lora_{key}." in name]
    return torch.cat([(p if key == "A" else p.T).any(1) for p in factors])


def test_a_pruned_rank_stays_pruned_and_nothing_is_left_of_it_nor_of_its_moments() -> None:
    model = rw.get_peft_model(llama(), _config())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    before = torch.ones_like(_rows(model, "A"))
    for batch in token_batches(40):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now = _rows(model, "A")
        assert torch.equal(now, model.rankwise_mask) and not (now & ~before).any()
        assert not _rows(model, "B")[~now].any()
        before = now
    assert before.any() and not before.all()
    for name, p in model.named_parameters():
        if p.requires_grad:
            off = ~(p if ".lora_A." in name else p.T).any(1)
            for moment in (optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]):
                assert not (moment if ".lora_A." in name else moment.T)[off].any()


@pytest.mark.parametrize(("target_r", "power"), [(2, 2 / 3), (1, 2 / 3), (0.5, 3 / 2)])
def test_below_an_average_rank_of_1_parameters_count_more(target_r: float, power: float) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 4)).double()
    model: Any = rw.get_peft_model(base, _config(init_r=3, target_r=target_r, target_modules=["0", "1"]))
    expected = []
    for layer in (model[0], model[1]):
        A, B = layer.lora_A["default"].data, nn.init.normal_(layer.lora_B["default"]).data
        mean = (B @ A).square().sum().div(3).sqrt()  # root mean square of the three singular values
        scale = 8 / 3  # lora_alpha / init_r
        expected.append(float(3 * (scale * mean) ** 0.5 / (A.shape[1] + B.shape[0]) ** power))
    assert [layer.importance for layer in model.rank_summary().layers] == pytest.approx(expected)


def test_a_run_of_one_form_does_not_resume_in_the_other() -> None:
    principal, paper = (
        rw.get_peft_model(llama(), _config(init_lora_weights=start)) for start in ("principal", True)
    )
    state = copy.deepcopy(principal.state_dict())
    with pytest.raises((ValueError, RuntimeError), match="size mismatch|form=principal"):
        paper.load_state_dict(state)


def test_rslora_is_refused_in_the_papers_form_only() -> None:
    assert _config(use_rslora=True).use_rslora
    with pytest.raises(ValueError, match="'principal'"):
        _config(use_rslora=True, init_lora_weights=True)


def test_the_default_lora_alpha_makes_up_for_the_rotation_and_is_twice_the_rank_where_nothing_rotates() -> (
    None
):
    left_out = {"lora_alpha": None}
    ranks = (0.25, 1, 2, 8, 64)
    alphas = [_config(init_r=65, target_r=r, **left_out).lora_alpha for r in ranks]
    assert alphas == [0.5, 2, 4, 23, 304]
    assert [_config(init_r=r, target_r=r, **left_out).lora_alpha for r in (2, 8)] == [4, 16], "plain LoRA"
    rslora = [_config(init_r=65, target_r=r, use_rslora=True, **left_out).lora_alpha for r in ranks]
    assert rslora == [0.5, 2, 4, 16, 128]
    assert _config(init_lora_weights=True, **left_out).lora_alpha == 8  # PEFT's default


def test_the_default_lora_alpha_follows_a_changed_target_and_a_given_one_stays() -> None:
    config = _config(init_r=8, lora_alpha=None)
    assert replace(config, init_r=16, target_r=8).lora_alpha == 23
    config.target_r = 4
    assert config.lora_alpha == 10
    assert replace(_config(lora_alpha=8), target_r=4).lora_alpha == 8
    saved = rw.LoraConfig.from_dict(config.to_dict())
    assert type(config.to_dict()["lora_alpha"]) is int
    assert replace(saved, target_r=8).lora_alpha == 10, "what a run was trained with is no default any more"


def test_the_penalty_is_off_unless_asked_for() -> None:
    assert _config().orth_reg_weight == 0
    assert _config(init_lora_weights=True).orth_reg_weight == 0.5
    assert _config(orth_reg_weight=0.1).orth_reg_weight == 0.1


def test_a_file_of_peft_means_the_papers_form_and_ours_the_default_form(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    peft.AdaLoraConfig(target_modules=TARGETS, total_step=40, init_r=6, target_r=2).save_pretrained(tmp_path)
    assert rw.AdaLoraConfig.from_pretrained(tmp_path).form.name == "paper"
    _config().save_pretrained(tmp_path)
    assert rw.AdaLoraConfig.from_pretrained(tmp_path) == _config(deltaT=1)
    with told() as messages:
        assert peft.PeftConfig.from_pretrained(tmp_path).init_lora_weights == "principal"
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
    assert moved == list(before) and moved
    layers = {row.path for row in model.rank_summary().layers if row.rank}
    assert {name.partition(".lora_B.")[0] for name in before} == layers


def _wide_and_narrow() -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(40, 40), *(nn.Linear(4, 4) for _ in range(3))])


def _train_the_narrow_ones(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        sum(layer(torch.randn(3, 4)).square().mean() for layer in model[1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_finished_adapter_of_many_narrow_ranks_is_not_pruned_again(tmp_path: Any) -> None:
    """It has twelve narrow ranks where four of average size are the target, and costs no more than these."""
    config = _config(target_r=1, init_r=4, target_modules=["0", "1", "2", "3"])
    model: Any = rw.get_peft_model(_wide_and_narrow(), config)
    _train_the_narrow_ones(model)
    assert [row.rank for row in model.rank_summary().layers] == [0, 4, 4, 4]
    model.save_pretrained(tmp_path)
    again: Any = rw.PeftModel.from_pretrained(_wide_and_narrow(), tmp_path, is_trainable=True)
    _train_the_narrow_ones(again)
    assert [row.rank for row in again.rank_summary().layers] == [0, 4, 4, 4]
    assert again.allocation_state is None  # plain LoRA, whose ranks are fixed


@pytest.mark.parametrize("start", [True, "principal"])
def test_a_target_that_leaves_no_rank_is_refused_and_the_model_stays_as_it_is(start: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    form = {"total_step": 9, "target_modules": ["0", "1"], "init_lora_weights": start}
    with pytest.raises(
        ValueError, match=r"`target_r`=0.2 leaves no rank at all for 2 layers: .* at least 0.5"
    ):
        rw.get_peft_model(model, rw.AdaLoraConfig(init_r=2, target_r=0.2, tinit=1, tfinal=2, **form))
    assert type(model) is nn.Sequential and type(model[0]) is nn.Linear and not list(model.buffers())
