"""Makes the folders next to it, with a version of rankwise whose default form still had E (commit d84bbef).

    PYTHONPATH=src python tests/storage/earlier/make.py tests/storage/earlier

``finished`` is the adapter of a finished run. ``checkpoint-4`` is the state of the same run after four of twelve steps.
``expected.safetensors`` holds the base model's weights, the optimizer's state at the checkpoint, and the outputs of the
adapted model at the checkpoint and at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, STOP = 12, 4
INPUTS = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(1))
WANTED = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))


class Experts(nn.Module):
    """Three matrices in one parameter. Each row of the input is multiplied by one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(part, self.up[number]) for number, part in enumerate(x.tensor_split(3))])


class Small(nn.Module):
    """A grouped convolution, linear layers (one of little effect), and a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)
        self.first = nn.Linear(16, 6)
        self.idle = nn.Linear(6, 6)
        self.experts = Experts()
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(self.conv(x).flatten(1)))
        hidden = hidden + 1e-4 * self.idle(hidden)
        output: Tensor = self.last(self.experts(hidden))
        return output


def optimizer_for(model: Any) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)


def train(model: Any, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        (model(INPUTS) - WANTED).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def main(folder: Path) -> None:
    import rankwise as rw

    torch.manual_seed(0)
    base = Small()
    expected = {f"base.{name}": value.clone() for name, value in base.state_dict().items()}
    config = rw.AdaLoraConfig(
        init_r=4, target_r=1, lora_alpha=3, tinit=2, tfinal=4, deltaT=2, total_step=STEPS,
        target_modules=["conv", "first", "idle", "last"], target_parameters=["experts.up"],
    )  # fmt: skip
    model: Any = rw.get_peft_model(base, config).train()
    optimizer = optimizer_for(model)
    train(model, optimizer, STOP)
    model.save_pretrained(folder / f"checkpoint-{STOP}")
    for number, state in optimizer.state_dict()["state"].items():
        expected |= {f"optimizer.{number}.{name}": value.clone() for name, value in state.items()}
    with torch.no_grad():
        expected["checkpoint"] = model(INPUTS)
    train(model, optimizer, STEPS - STOP)
    model.save_pretrained(folder / "finished")
    with torch.no_grad():
        expected["finished"] = model(INPUTS)
    save_file({name: value.contiguous() for name, value in expected.items()}, folder / "expected.safetensors")
    ranks = {row.path: row.rank for row in model.rank_summary().layers}
    (folder / "ranks.json").write_text(json.dumps(ranks, indent=2) + "\n")
    print(ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
