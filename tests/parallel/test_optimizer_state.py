"""How the state that an optimizer keeps of a parameter restarts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankwise.parallel.optimizer_state import start_anew


@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit"])
def test_8_bit_states_of_bitsandbytes_restart_in_place(kind: str) -> None:
    """The memory of its paged optimizers is never freed."""
    make = getattr(pytest.importorskip("bitsandbytes").optim, kind)
    torch.manual_seed(0)
    used = nn.Parameter(torch.randn(64, 80))
    optimizer = make([used], lr=0.01, weight_decay=0.0)
    for _ in range(3):
        used.grad = torch.randn_like(used)
        optimizer.step()
    new = nn.Parameter(used.detach().clone())
    before = dict(optimizer.state[used])
    start_anew(optimizer, used)
    used.grad = new.grad = torch.randn_like(used)
    optimizer.step()
    make([new], lr=0.01, weight_decay=0.0).step()
    assert torch.equal(used, new) and optimizer.state[used]["step"] == 1
    assert optimizer.state[used]["state1"] is before["state1"]
