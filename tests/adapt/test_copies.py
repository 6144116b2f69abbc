"""Copies of a model whose ranks adapt: they carry their run along, and continue independently."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import rankwise as rw
from lora_world import COPIES, STEPS, train, with_lora
from rankwise.adapt.ranks import HANDLES
from tiny import told


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_goes_on_as_the_original_does_and_neither_touches_the_other(
    copied: Callable[[Any], Any],
) -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=2, total_step=STEPS, tfinal=15)
    train(model, "linear", 12)
    other = copied(model)
    again = vars(other)[HANDLES]["default"]
    assert again is not ranks and again.allocation_state == ranks.allocation_state

    losses = train(model, "linear", STEPS - 12)
    assert again.allocation_state.step == 12
    assert train(other, "linear", STEPS - 12) == losses
    assert again.is_over and again.rank_history == ranks.rank_history


@pytest.mark.parametrize("copied", COPIES)
def test_values_that_come_into_a_copy_concern_the_run_of_the_copy_alone(copied: Callable[[Any], Any]) -> None:
    model = with_lora("linear")
    rw.adapt_ranks(model, target_r=2, total_step=STEPS, tfinal=15)
    train(model, "linear", 12)
    model.load_state_dict(model.state_dict())
    other, third = copied(model), copied(model)
    vars(third)[HANDLES]["default"].detach()
    for each, count in ((third, 0), (other, 1), (model, 1)):
        with told() as messages:
            train(each, "linear", 1)
        assert len(messages) == count
        assert not any(module._forward_pre_hooks for module in each.modules())
    assert not third._load_state_dict_pre_hooks and not third._state_dict_pre_hooks


@pytest.mark.parametrize("end", ["in mid-run", "over", "detached"])
def test_a_run_does_not_keep_its_model_alive(end: str) -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=2, total_step=STEPS, tfinal=15)
    train(model, "linear", STEPS if end == "over" else 12)
    if end == "in mid-run":
        model.load_state_dict(model.state_dict())
    if end == "detached":
        ranks.detach()
    alive = weakref.ref(model)
    del model, ranks
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_a_model_whose_run_is_over_trains_on_without_a_warning(
    copied: Callable[[Any], Any],
) -> None:
    model = with_lora("linear")
    rw.adapt_ranks(model, target_r=1.5, total_step=STEPS, tfinal=15)
    train(model, "linear")
    other = copied(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = train(other, "linear", steps=5)
    assert losses[-1] < losses[0]
