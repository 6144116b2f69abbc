"""The cost of a cut that can be counted: its tensor operations, each of which is a launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from costs import Operations
from torch import nn

import rankwise as rw
from rankwise.run.controller import Controller

SCHEDULE: dict[str, Any] = {"total_step": 100, "tinit": 1, "tfinal": 10, "deltaT": 2}


def _own(model: nn.Module, **form: Any) -> Any:
    return rw.get_peft_model(
        model, rw.AdaLoraConfig(init_r=4, target_r=2, **_targets(model), **SCHEDULE, **form)
    )


def _pefts(model: nn.Module) -> Any:
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, **_targets(model)))
    rw.adapt_ranks(adapted, target_r=2, **SCHEDULE)
    return adapted


def _targets(model: nn.Module) -> dict[str, list[str]]:
    return {"target_modules": [name for name, _ in model.named_children()]}


def _operations_of_a_cut(
    attach: Callable[[nn.Module], Any], layers: int, monkeypatch: pytest.MonkeyPatch
) -> int:
    """The number of operations of a second cut, in a chain of layers of one shape."""
    torch.manual_seed(0)
    model = attach(nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))))
    counts, cut = [], Controller._cut

    def counted(controller: Controller, ranks: int) -> None:
        with Operations() as operations:
            cut(controller, ranks)
        counts.append(operations.count)

    monkeypatch.setattr(Controller, "_cut", counted)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        model(torch.randn(3, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    monkeypatch.undo()
    return counts[1]


@pytest.mark.parametrize(
    ("attach", "most"), [(_own, 320), (_pefts, 320), (lambda model: _own(model, init_lora_weights=True), 80)]
)
def test_operations_of_a_cut_do_not_grow_with_the_layers_of_one_shape(
    attach: Callable[[nn.Module], Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (_operations_of_a_cut(attach, layers, monkeypatch) for layers in (3, 9))
    assert few == many <= most
