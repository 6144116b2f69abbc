"""An adapter that is attached after the model was wrapped or sharded would train alone in every process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rankwise as rw

LORA = rw.LoraConfig(r=2, target_modules=["0"])
ADALORA = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules=["0"])
REFUSED = "already, which would not average the gradients of an adapter"
WRAPPERS = {
    "DistributedDataParallel": (DistributedDataParallel, REFUSED),
    "FSDP2": (fully_shard, REFUSED),
    "DataParallel": (nn.DataParallel, "fit no other model"),
}


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def partly_wrapped() -> nn.Module:
    return nn.ModuleDict({"body": DistributedDataParallel(layers()), "head": nn.Sequential(nn.Linear(2, 2))})


@pytest.mark.parametrize("config", [LORA, ADALORA])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_adapter_is_refused_that_comes_after_the_wrapper(config: Any, wrapper: str) -> None:
    wrap, why = WRAPPERS[wrapper]
    model: Any = wrap(layers())
    kind = type(model)
    with pytest.raises(ValueError, match=why):
        rw.get_peft_model(model, config)
    assert type(model) is kind and not hasattr(model, "peft_config")
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_a_second_adapter_is_refused_that_comes_after_sharding_unless_it_is_for_inference(
    tmp_path: Path,
) -> None:
    rw.get_peft_model(layers(), LORA).save_pretrained(tmp_path)
    model = fully_shard(rw.get_peft_model(layers(), LORA))
    with pytest.raises(ValueError, match=REFUSED):
        model.add_adapter("second", LORA)
    with pytest.raises(ValueError, match=REFUSED):
        model.load_adapter(tmp_path, "second", is_trainable=True)
    assert list(model.peft_config) == ["default"]
    model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default", "second"]


def test_only_layers_inside_of_the_wrapper_are_refused() -> None:
    with pytest.raises(ValueError, match=f"'body' is in DistributedDataParallel {REFUSED}"):
        rw.get_peft_model(partly_wrapped(), rw.LoraConfig(r=2, target_modules=["body.module.0"]))
    rw.get_peft_model(partly_wrapped(), rw.LoraConfig(r=2, target_modules=["head.0"]))


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_ranks_of_pefts_adapter_are_not_adapted_if_it_came_after_the_wrapper(wrap: Any) -> None:
    late = peft.get_peft_model(wrap(layers()), peft.LoraConfig(r=4, target_modules=r".*\b0"))
    with pytest.raises(ValueError, match=REFUSED):
        rw.adapt_ranks(late, total_step=20)
    early = peft.get_peft_model(layers(), peft.LoraConfig(r=4, target_modules=["0"]))
    rw.adapt_ranks(wrap(early), total_step=20)
