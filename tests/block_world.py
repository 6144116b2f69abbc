"""A user's model with a head, adapters for it, and a snapshot of everything that a failure could change."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw

TOKENS = torch.arange(24).reshape(2, 12) * 5 % 64


class Block(nn.Module):
    """A user's nested model with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict(first=nn.Linear(6, 8), relu=nn.ReLU(), second=nn.Linear(8, 6)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def block(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Block()


def lora(**changes: Any) -> rw.LoraConfig:
    return rw.LoraConfig(
        **{"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False, **changes}
    )


def adalora(**changes: Any) -> rw.AdaLoraConfig:
    schedule = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 12, "lora_alpha": 16}
    return rw.AdaLoraConfig(**{**schedule, "target_modules": ["first", "second"], **changes})


def two_adapters() -> tuple[Any, dict[str, Tensor]]:
    """A block with adapters "default" and "other"; and the outputs of each adapter and of the base."""
    model = block()
    outputs = {"base": model(X)}
    rw.get_peft_model(model, lora())
    outputs["default"] = model(X)
    model.add_adapter("other", lora(target_modules=["second"], r=3))
    assert torch.equal(model(X), outputs["default"]), "an added adapter does not act by itself"
    model.set_adapter("other")
    outputs["other"] = model(X)
    model.set_adapter("default")
    assert len({float(output.detach().sum()) for output in outputs.values()}) == 3
    return model, outputs


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything in a model that a failure could change."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "state": {
            key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)
        },
        "grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": [module.training for module in model.modules()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in before["state"])
    for part in ("classes", "attributes", "hooks", "grad", "training"):
        assert before[part] == after[part], part


def train(model: Any, steps: int, lr: float = 0.1, seed: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator)
        (model(x) - x[:, :3].flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
