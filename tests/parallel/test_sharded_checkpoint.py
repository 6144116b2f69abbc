"""`torch.distributed.checkpoint` holds the run, whether the parameters were sharded when it was written or are now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_whole_copies import BATCHES, adapted, process_group, sharded  # noqa: F401

from one_run import train

CASES = [("rankwise", False), ("rankwise", True), ("peft", False), ("peft", True)]


def begin(library: str, shards: bool) -> tuple[Any, torch.optim.Optimizer, Any]:
    model, ranks = adapted(library)
    wrapped = sharded(model) if shards else model
    return wrapped, torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2), ranks


@pytest.mark.parametrize(("library", "shards"), CASES)
def test_a_run_resumes_from_a_sharded_checkpoint_of_whole_parameters(
    library: str, shards: bool, tmp_path: Path
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def held(inner: Any, optimizer: torch.optim.Optimizer, ranks: Any) -> dict[str, Any]:
        states = dict(zip(("model", "optimizer"), get_state_dict(inner, optimizer), strict=True))
        return states if library == "rankwise" else {**states, "ranks": ranks}

    model, optimizer, ranks = begin(library, False)
    train(model, optimizer, BATCHES[:5])
    dcp.save(held(model, optimizer, ranks), checkpoint_id=tmp_path)
    expected = train(model, optimizer, BATCHES[5:])

    model, optimizer, its_ranks = begin(library, shards)
    inner = model.model if shards else model
    states = held(inner, optimizer, its_ranks)
    dcp.load(states, checkpoint_id=tmp_path)
    set_state_dict(inner, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    assert train(model, optimizer, BATCHES[5:]) == pytest.approx(expected, abs=1e-5)
    assert its_ranks.rank_history == ranks.rank_history
