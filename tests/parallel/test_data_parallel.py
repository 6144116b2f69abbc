"""``nn.DataParallel``, which Transformers' Trainer uses by itself where it sees several GPUs in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import rankwise as rw


def replica_of(model: nn.Module) -> Any:
    """A replica of ``model`` on its own device, made as ``torch.nn.parallel.replicate`` makes those on GPUs."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
    return replicas[model]


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


def own(config: Callable[..., Any], **form: Any) -> Any:
    return rw.get_peft_model(perceptron(), config(target_modules=["0", "1", "3"], **form))


def sped_up() -> Any:
    config = peft.LoraConfig(r=2, target_modules=["1", "3"], init_lora_weights=False)
    model = peft.get_peft_model(perceptron(), config)
    rw.speed_up(model)
    return model


SCHEDULE = {"init_r": 2, "target_r": 1, "total_step": 9, "tinit": 1, "tfinal": 2}
MODELS = {
    "LoRA": lambda: own(rw.LoraConfig, r=2, init_lora_weights=False),
    "AdaLoRA": lambda: own(rw.AdaLoraConfig, **SCHEDULE),
    "paper": lambda: own(rw.AdaLoraConfig, **SCHEDULE, init_lora_weights=True),
    "PEFT": sped_up,
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_replica_computes_the_same_and_its_gradients_are_the_models(kind: str) -> None:
    model, x = MODELS[kind](), torch.arange(9)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            nn.init.normal_(parameter)
    made = []
    for each in (model, replica_of(model)):
        assert type(each) is type(model)
        output = each(x)
        output.square().sum().backward()
        made.append((output, [p.grad for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    torch.testing.assert_close(made[1], made[0])
