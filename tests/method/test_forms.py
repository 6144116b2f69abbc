"""The forms of the method: how each starts, which scale it has, what it scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.method.forms import form_of
from rankwise.method.layout import TripletLayout

LAYOUT = TripletLayout(ranks=(8,), widths_in=(50,), widths_out=(40,))


def started(form: Any, gate: float) -> tuple[Tensor, Tensor, Tensor]:
    """A, E and B in float64 after the form's start, with a plain LoRA's start of A = 3 and B = 0."""
    torch.manual_seed(0)
    A, E, B = (torch.full(shape, 9.0, dtype=torch.float64) for shape in ((8, 50), (8, 1), (40, 8)))

    def as_lora(A: Tensor, B: Tensor) -> None:
        nn.init.constant_(A, 3.0)
        nn.init.zeros_(B)

    form.start(A, E, B, as_lora, gate)
    return A, E, B


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 12 / 8), (True, 12 / math.sqrt(8))])
def test_an_open_gate_makes_the_scale_loras_at_the_target_rank(use_rslora: bool, expected: float) -> None:
    assert form_of("gated").gate(12, 8, use_rslora) == pytest.approx(expected, rel=1e-15)


def test_the_gated_form_starts_as_lora_with_all_gates_open() -> None:
    A, E, B = started(form_of("gated"), gate=1.5)
    assert torch.equal(A, torch.full_like(A, 3.0)) and not B.any()
    assert torch.equal(E, torch.full_like(E, 1.5))


def test_the_papers_form_starts_with_no_update_and_small_random_factors() -> None:
    A, E, B = started(form_of(True), gate=1.0)
    assert not E.any()
    for factor in (A, B):
        assert factor.std().item() == pytest.approx(0.02, rel=0.15)
        assert factor.mean().item() == pytest.approx(0, abs=0.02 / 4)


def test_a_random_start_of_the_papers_form_changes_the_output() -> None:
    A, E, B = started(form_of(False), gate=1.0)
    assert (B @ torch.diag(E.flatten()) @ A).abs().max() > 1


def test_what_trains_is_what_is_scored_or_decides_it() -> None:
    for start in ("gated", True, False, "gaussian"):
        form = form_of(start)
        importance = form.importance(LAYOUT)
        assert set(importance.factors) <= set(form.trained) and importance.decisive in form.trained
        assert form.importance(LAYOUT).entries in (LAYOUT.triplets, LAYOUT.elements)


def test_a_left_out_alpha_grows_with_small_ranks_only() -> None:
    gated, paper = form_of("gated"), form_of(True)
    assert [gated.lora_alpha(rank, False) for rank in (1, 2, 8, 64)] == [4, 8, 32, 32]
    assert gated.lora_alpha(64, True) == 8
    assert [paper.lora_alpha(rank, False) for rank in (1, 64)] == [8, 8]
