"""The forms of the method: their start, their scale, and the quantity that they score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.method.forms import form_of


def started(form: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """A, E and B in float64 after the form's start, if plain LoRA's start is A = 3 and B = 0."""
    torch.manual_seed(0)
    A, E, B = (torch.full(shape, 9.0, dtype=torch.float64) for shape in ((8, 50), (8, 1), (40, 8)))
    given = E if form.has_E else None

    def as_lora(A: Tensor, B: Tensor) -> None:
        nn.init.constant_(A, 3.0)
        nn.init.zeros_(B)

    form.start(A, given, B, as_lora)
    return A, given, B


def test_the_default_form_starts_as_lora_and_has_no_third_factor() -> None:
    A, E, B = started(form_of("principal"))
    assert torch.equal(A, torch.full_like(A, 3.0)) and not B.any() and E is None


def test_the_papers_form_starts_with_no_update_and_small_random_factors() -> None:
    A, E, B = started(form_of(True))
    assert not E.any()
    for factor in (A, B):
        assert factor.std().item() == pytest.approx(0.02, rel=0.15)
        assert factor.mean().item() == pytest.approx(0, abs=0.02 / 4)


def test_a_random_start_of_the_papers_form_changes_the_output() -> None:
    A, E, B = started(form_of(False))
    assert (B @ torch.diag(E.flatten()) @ A).abs().max() > 1


def test_only_the_papers_form_has_a_third_factor_and_counts_ranks_alike() -> None:
    for start in (True, False, "gaussian"):
        form = form_of(start)
        assert form.has_E and not form.counts_parameters and not form.takes_rslora
    form = form_of("principal")
    assert not form.has_E and form.counts_parameters and form.takes_rslora


def test_omitted_settings_follow_the_target_rank() -> None:
    principal, paper = form_of("principal"), form_of(True)
    assert [principal.lora_alpha(rank, False) for rank in (0.25, 1, 2, 8, 64)] == [0.5, 2, 4, 23, 304]
    assert [principal.init_r(r) for r in (0.1, 0.9, 1, 4, 8, 64)] == [8, 8, 8, 8, 16, 128]
    assert [paper.lora_alpha(rank, False) for rank in (1, 64)] == [8, 8]
    assert [paper.init_r(rank) for rank in (1, 8)] == [12, 12]
    assert [principal.deltaT(steps) for steps in (5, 40, 6000)] == [1, 2, 300]
