"""After an evaluation, `fully_shard` leaves whole copies in the place of parameters. Runs act on the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from tiny import llama, token_batches

peft = pytest.importorskip("peft")
BATCHES = token_batches(8)


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def adapted(library: str) -> tuple[Any, Any]:
    """A model, and the object that controls its ranks."""
    torch.manual_seed(1)
    layers, phases = ["q_proj", "up_proj", "lm_head"], dict(tinit=1, tfinal=2, deltaT=1)
    if library == "rankwise":
        config = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=8, target_modules=layers, **phases)
        model = rw.get_peft_model(llama(tie_word_embeddings=False), config)
        return model, model
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers)
    model = peft.get_peft_model(llama(tie_word_embeddings=False), config)
    return model, rw.adapt_ranks(model, target_r=2, total_step=8, **phases)


class Around(nn.Module):
    """A module of one's own around the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


def sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in (model.base_model.model if isinstance(model, peft.PeftModel) else model).model.layers:
        fully_shard(block, reshard_after_forward=False)
    return fully_shard(Around(model))


@torch.no_grad()
def evaluated(model: Any) -> float:
    return float(model(**BATCHES[0]).loss)


def train(model: Any, evaluates: bool = False) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in BATCHES[:5]:
        model(**batch).loss.backward()
        if evaluates:
            evaluated(model)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("evaluates", [False, True], ids=["", "evaluating before each step"])
@pytest.mark.parametrize("library", ["rankwise", "peft"])
def test_ranks_that_are_finished_after_an_evaluation_stay_so_and_are_saved(
    library: str, evaluates: bool, tmp_path: Path
) -> None:
    whole, ranks = adapted(library)
    train(whole)
    ranks.finalize_ranks()

    model, ranks_too = adapted(library)
    wrapped = sharded(model)
    train(wrapped, evaluates)
    evaluated(wrapped)
    ranks_too.finalize_ranks()
    assert evaluated(wrapped) == pytest.approx(evaluated(whole), abs=1e-5)
    assert ranks_too.rank_history == ranks.rank_history
    if library == "rankwise":
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=False), tmp_path)
        assert evaluated(loaded) == pytest.approx(evaluated(whole), abs=1e-5)


def test_a_model_that_was_evaluated_is_still_a_sharded_one() -> None:
    model, _ = adapted("rankwise")
    wrapped = sharded(model)
    before = model.get_extra_state()
    evaluated(wrapped)
    assert isinstance(before, str) and model.get_extra_state() == before
    evaluated(wrapped)
    with pytest.raises(ValueError, match="can't work on a model that is sharded"):
        model.merge_adapter()
