"""Small models with PEFT's LoRA, one for each kind of layer that PEFT adapts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

STEPS = 40


def _saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [  # ways to copy a model
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
    pytest.param(_saved, id="torch.save"),
]


class Images(nn.Module):
    """Convolutions of one, two or three dimensions."""

    def __init__(self, dimensions: int = 2) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.one, self.two = kind(3, 8, 3, padding=1), kind(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.two(torch.tanh(self.one(x)))
        return self.head(hidden.flatten(2).mean(2))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.embed(x)).mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x)[0].mean(1))


class Experts(nn.Module):
    """A stack of three matrices in one parameter. Each example uses two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 8) / 3)  # (experts, out, in)
        self.down = nn.Parameter(torch.randn(3, 8, 10) / 3)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for expert in range(3):
            hidden = torch.tanh(nn.functional.linear(x, self.up[expert]))
            used = (torch.arange(len(x)) % 3 != expert).to(x.dtype)[:, None]
            total = total + used * nn.functional.linear(hidden, self.down[expert])
        return total


class WithExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.experts, self.head = nn.Linear(8, 8), Experts(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(torch.tanh(self.enter(x))))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(16, 8), nn.Tanh(), Conv1D(4, 16))


WORLDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "linear": (perceptron, {"target_modules": ["0", "2", "4"]}, (8,)),
    "conv1d of transformers": (transposed, {"target_modules": ["0", "2"], "fan_in_fan_out": True}, (8,)),
    "conv1d": (lambda: Images(1), {"target_modules": ["one", "two"]}, (3, 9)),
    "conv2d": (lambda: Images(2), {"target_modules": ["one", "two"]}, (3, 5, 5)),
    "conv3d": (lambda: Images(3), {"target_modules": ["one", "two"]}, (3, 3, 3, 3)),
    "embedding": (Words, {"target_modules": ["embed", "fc"]}, ()),
    "attention": (Attention, {"target_modules": ["attn", "head"]}, (5, 8)),
    "experts": (
        WithExperts,
        {"target_modules": ["enter"], "target_parameters": ["experts.up", "experts.down"]},
        (8,),
    ),
}


def base(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of a world. Each call gives the same."""
    torch.manual_seed(0)
    return WORLDS[name][0]().to(dtype)


def examples(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    shape = WORLDS[name][2]
    x = torch.randint(0, 20, (24, 6)) if name == "embedding" else torch.randn(24, *shape, dtype=dtype)
    return x, torch.randn(24, 4, dtype=dtype)


def with_lora(name: str, model: nn.Module | None = None, **changes: Any) -> Any:
    """A world's model with PEFT's LoRA. Each call gives the same."""
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 8, **WORLDS[name][1], **changes}
    return peft.get_peft_model(model or base(name), peft.LoraConfig(**settings), autocast_adapter_dtype=False)


def train(
    model: Any,
    name: str,
    steps: int = STEPS,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype = torch.float64,
    lr: float = 2e-2,
) -> list[float]:
    """Train on one batch in a plain loop. Return the losses."""
    x, y = examples(name, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        loss = (model(x).to(dtype) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
