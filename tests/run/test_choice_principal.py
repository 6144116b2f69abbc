"""The sums of every block's gradient norms over the steps, compared with sums that are written out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from expert_world import EXPERTS, tiny_moe
from rankwise.parallel.holder import Measured
from rankwise.parallel.sharded import squared_norms
from rankwise.parallel.zero import Piece, ZeroParts
from rankwise.parallel.zero_holder import ZeroStep


def _config(**changes: Any) -> rw.AdaLoraConfig:
    options: dict[str, Any] = {
        "init_r": 3,
        "target_r": 1,
        "tinit": 6,
        "tfinal": 2,
        "total_step": 20,
        "deltaT": 2,
    }
    return rw.AdaLoraConfig(**{**options, **changes})


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()


def test_the_gradients_of_the_factor_that_starts_at_0_are_summed() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4)).double()
    model: Any = rw.get_peft_model(base, _config(target_modules=["0", "1"]))
    factors = [model[0].lora_A["default"], model[1].lora_B["default"]]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    expected = [0.0, 0.0]
    for step in range(1, 11):
        kept = [layer.rank for layer in model.rank_summary().layers]
        model(torch.randint(11, (8,))).square().mean().backward()
        for place, factor in enumerate(factors):
            expected[place] += math.sqrt(float(factor.grad.square().sum()) / max(kept[place], 1))
        optimizer.step()
        optimizer.zero_grad()
        assert model.rankwise_sensitivity.tolist() == pytest.approx(expected), step
    assert sum(kept) < 6, "something should have been cut, or the ranks that act are not seen to count"


def test_each_matrix_of_a_stack_of_experts_has_its_own_sum() -> None:
    model: Any = rw.get_peft_model(tiny_moe("mixtral"), _config(target_modules=[], target_parameters=EXPERTS))
    factors = [p for name, p in model.named_parameters() if ".lora_B." in name]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(1, 50, (4, 8))
    _step(model, optimizer, model(input_ids=tokens, labels=tokens).loss)
    expected = [
        float((factor.grad[:, 3 * number : 3 * number + 3].square().sum() / 3).sqrt())
        for factor in factors
        for number in range(4)
    ]
    assert model.rankwise_sensitivity.tolist() == pytest.approx(expected)
    assert len(set(expected)) > 8


def test_a_run_that_prunes_nothing_sums_nothing() -> None:
    model: Any = rw.get_peft_model(nn.Sequential(nn.Linear(4, 4)), _config(target_r=3, target_modules=["0"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    _step(model, optimizer, model(torch.randn(2, 4)).square().mean())
    assert model.rankwise_sensitivity.tolist() == [0.0]


def test_without_any_gradient_directions_are_worth_their_strength() -> None:
    torch.manual_seed(0)
    model: Any = rw.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), _config(target_modules=["0", "1"])
    )
    for layer, size in ((model[0], 1.0), (model[1], 9.0)):
        nn.init.normal_(layer.lora_B["default"], std=size)
    model.finalize_ranks()
    assert [layer.rank for layer in model.rank_summary().layers] == [0, 2]


def test_a_checkpoint_from_before_gradients_were_summed_resumes() -> None:
    model: Any = rw.get_peft_model(nn.Sequential(nn.Linear(4, 4)), _config(target_modules=["0"]))
    state = {
        **model.state_dict(),
        "rankwise_sensitivity": torch.zeros(1),
        "rankwise_uncertainty": torch.zeros(0),
    }
    again: Any = rw.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), _config(target_modules=["0", "1"])
    )
    several = {**again.state_dict(), "rankwise_sensitivity": torch.zeros(1)}
    model.load_state_dict(state)
    again.load_state_dict(several)
    assert again.rankwise_sensitivity.tolist() == [0.0, 0.0]


def test_squared_norms_are_those_of_each_block_and_0_without_a_gradient() -> None:
    torch.manual_seed(0)
    one, several = torch.randn(5, 3), torch.randn(4, 6).to(torch.bfloat16)
    found = squared_norms([one, None, several, None], [1, 1, 3, 2], torch.device("cpu"))
    blocks = [float(part.float().square().sum()) for part in several.split(2, dim=1)]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([float(one.square().sum()), 0, *blocks, 0, 0])


@pytest.mark.parametrize("cut", [0, 5, 17, 24])
def test_pieces_of_a_factor_add_up_to_the_squared_norms_of_its_blocks(cut: int) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(4, 6)
    flat = gradient.flatten()
    step = ZeroStep(ZeroParts([nn.Parameter(gradient)]), [0], torch.optim.SGD([gradient]))
    for blocks, order in itertools.product((1, 3), (None, torch.tensor([3, 0, 5, 1, 4, 2]))):
        pieces = [Piece(0, start, flat[start:end], flat[start:end]) for start, end in ((0, cut), (cut, 24))]
        found = sum(step._by_block(piece, Measured(0, blocks, order)) for piece in pieces)
        wanted = squared_norms([gradient], [blocks], torch.device("cpu"), [order])
        torch.testing.assert_close(found, wanted)
    by_hand = [float(gradient[:, columns].square().sum()) for columns in ([3, 0], [5, 1], [4, 2])]
    assert wanted.tolist() == pytest.approx(by_hand)
