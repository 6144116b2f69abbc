"""AdaLoRA runs exactly as in PEFT: same start, data and optimizer give the same losses and the same ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankwise as rw
from tiny import llama, token_batches

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]


def _train_both(penalty: float, deltaT: int, steps: int = 60) -> tuple[list[float], list[float], Any, Any]:
    """Train PEFT's AdaLoRA and rankwise's on the same data. The losses are the models' own, without the penalty."""
    options = {
        "init_r": 6, "target_r": 3, "tinit": 10, "tfinal": 15, "deltaT": deltaT, "total_step": steps, "lora_alpha": 12,
        "orth_reg_weight": penalty, "target_modules": TARGETS, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    theirs = peft.get_peft_model(llama(), peft.AdaLoraConfig(**options))
    ours = rw.get_peft_model(llama(), rw.AdaLoraConfig(**options, init_lora_weights=True))
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            own[name.removeprefix("base_model.model.")].data.copy_(parameter.data)
    their_optimizer, our_optimizer = (
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for model in (theirs, ours)
    )
    their_losses, our_losses = [], []
    for step, batch in enumerate(token_batches(steps), 1):
        with torch.no_grad():
            their_losses.append(float(theirs.get_base_model()(**batch).loss))
        theirs(**batch).loss.backward()
        their_optimizer.step()
        theirs.base_model.update_and_allocate(step)
        their_optimizer.zero_grad()

        loss = ours(**batch).loss
        our_losses.append(float(loss.detach()))
        loss.backward()
        our_optimizer.step()
        our_optimizer.zero_grad()
    return their_losses, our_losses, theirs, ours


@pytest.mark.parametrize("deltaT", [1, 5])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_losses_and_ranks_equal_pefts(penalty: float, deltaT: int) -> None:
    their_losses, our_losses, theirs, ours = _train_both(penalty, deltaT)
    difference = max(abs(a - b) for a, b in zip(their_losses, our_losses, strict=True))
    print(f"penalty {penalty}, deltaT {deltaT}: largest loss difference {difference:.2e}")
    pattern = {
        name.removesuffix(".lora_E.default").removeprefix("base_model.model."): kept
        for name, kept in theirs.peft_config["default"].rank_pattern.items()
    }
    assert {row.path: row.rank for row in ours.rank_summary().layers} == {
        k: sum(v) for k, v in pattern.items()
    }
    assert len({sum(kept) for kept in pattern.values()}) > 1, (
        "the ranks should differ, or the test shows nothing"
    )
    assert difference < 2e-5
    assert their_losses[-1] < their_losses[0] - 0.05, "the models should learn, or the test shows nothing"
