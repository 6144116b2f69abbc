"""Nothing depends on PyTorch's default device: what rankwise computes is where the model is, or on the CPU.

The default device here is "meta", on which no value can be read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_world
import rankwise as rw
from test_default_dtype import (
    FORMS,
    TARGETS,
    Block,
    batches,
    config_of,
    files,
    state_of,
    tensors_made_without,
)


@contextmanager
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def life(form: str, base: Block, data: list[torch.Tensor], folder: Path) -> tuple[Any, ...]:
    """The results when an adapter is trained, cut, saved, loaded, compressed, exported and merged."""
    model: Any = rw.get_peft_model(base, config_of(form, [*TARGETS, "words"]))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:  # `normal_` on a CPU tensor takes the CPU's generator
                torch.manual_seed(number)
                parameter.normal_(std=0.3)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.03)
    for step, ids in enumerate(data):
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            model.save_pretrained(folder / "checkpoint-4")
            rw.set_peft_model_state_dict(model, rw.get_peft_model_state_dict(model))
    model.save_pretrained(folder / "own")
    rw.compress_adapter(folder / "cut", model, keep=0.8)
    rw.export_adapter(folder / "plain", model, "peft-lora")
    bare = copy.deepcopy(model).unload()
    loaded: Any = rw.PeftModel.from_pretrained(copy.deepcopy(bare), folder / "own")
    resumed: Any = rw.PeftModel.from_pretrained(bare, folder / "checkpoint-4", is_trainable=True)
    states = [state_of(each) for each in (model, loaded, resumed)]
    written = [files(folder / name) for name in ("own", "checkpoint-4", "cut", "plain")]
    return [*states, state_of(loaded.merge_and_unload())], written, str(model.rank_summary())


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_lives_the_same_life_under_another_default_device(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    base, data = Block(), batches()
    states, written, summary = life(form, copy.deepcopy(base), data, tmp_path / "usual")
    with elsewhere():
        others, other_written, other_summary = life(form, base, data, tmp_path / "other")
    assert summary == other_summary and written == other_written
    for one, other in zip(states, others, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ["linear", "embedding", "experts"])
def test_a_run_on_pefts_layers_ends_the_same_under_another_default_device(name: str) -> None:
    x, y = lora_world.examples(name)
    losses: dict[bool, list[float]] = {}
    for moved in (False, True):
        model = lora_world.with_lora(name)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-2)
        losses[moved] = []
        ranks: Any = None
        for step in range(10):
            loss = (model(x) - y).square().mean()
            loss.backward()
            losses[moved].append(float(loss.detach()))
            if moved:
                torch.set_default_device("meta")
            try:
                ranks = ranks or rw.adapt_ranks(model, target_r=2, total_step=10, deltaT=1)
                optimizer.step()
                if step == 3:
                    ranks.load_state_dict(ranks.state_dict())
            finally:
                torch.set_default_device(None)
            optimizer.zero_grad()
        assert ranks.is_over
    assert losses[True] == losses[False]


# --- code that would bring the fault back ----------------------------------------------------------------------------

SCRIPTS = {"recipes", "cli", "report"}  # the command line's own scripts never change the default device


def test_no_tensor_is_made_on_the_default_device() -> None:
    found = [where for name, _, where in tensors_made_without("device") if name.split("/")[0] not in SCRIPTS]
    assert not found, "Give these a device."
