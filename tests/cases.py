"""Random cases for tests of the method: schedules, layers with few different shapes, and their factors."""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import settings
from torch import Tensor

import rankwise as rw
from rankwise.method.layout import TripletLayout

seeds = st.integers(0, 2**32 - 1)


def random_cases(count: int) -> Any:
    return settings(max_examples=count, deadline=None, database=None, derandomize=True)


@st.composite
def schedules(draw: Any, longest: int = 20_000) -> rw.BudgetSchedule:
    total_step = draw(st.integers(1, longest))
    last_allocation = draw(st.integers(1, total_step))
    tinit = draw(st.integers(0, last_allocation - 1))
    return rw.BudgetSchedule(tinit, total_step - last_allocation, total_step, draw(st.integers(1, 50)))


def random_layout(generator: random.Random) -> TripletLayout:
    """Layers with few different shapes, as in real models, in random order."""
    shapes = [(generator.randint(1, 5), generator.randint(1, 7), generator.randint(1, 7)) for _ in range(3)]
    chosen = [generator.choice(shapes) for _ in range(generator.randint(1, 6))]
    ranks, widths_in, widths_out = zip(*chosen, strict=True)
    return TripletLayout(ranks, widths_in, widths_out)


def random_factors(layout: TripletLayout, scale: float) -> list[Tensor]:
    """All A, then all E, then all B."""
    layers = list(zip(layout.ranks, layout.widths_in, layout.widths_out, strict=True))
    A = [torch.randn(rank, width) for rank, width, _ in layers]
    E = [torch.randn(rank, 1) for rank, _, _ in layers]
    B = [torch.randn(width, rank) for rank, _, width in layers]
    return [scale * matrix for matrix in (*A, *E, *B)]
