"""The summary and the history of an adapted model's ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rankwise as rw
from block_world import adalora, block, lora, train


def test_summary_and_history_after_training() -> None:
    model = rw.get_peft_model(block(), adalora(target_r=1, deltaT=2))
    assert [(row.path, row.rank, row.init_r) for row in model.rank_summary().layers] == [
        ("body.first", 4, 4),
        ("body.second", 4, 4),
    ]
    train(model, 12)
    summary, history = model.rank_summary(), model.rank_history
    assert history.layers == ["body.first", "body.second"]
    assert [record.step for record in history.records] == [0, 4, 6, 8, 9]
    assert history.records[0].budget == 8 and list(history.records[0].ranks) == [4, 4]
    assert all(record.budget == sum(record.ranks) for record in history.records)
    assert list(history.records[-1].ranks) == [row.rank for row in summary.layers]
    assert summary.total_rank == 2 and summary.budget == 8
    sizes = {"body.first": 6 + 8, "body.second": 8 + 6}
    assert summary.parameters == sum(row.rank * sizes[row.path] for row in summary.layers)
    assert all(row.importance >= 0 for row in summary.layers)
    assert "rank 2 of 8" in str(summary)


def test_summary_of_a_loaded_adapter_and_of_plain_lora(tmp_path: Path) -> None:
    model = rw.get_peft_model(block(), adalora(target_r=1))
    train(model, 12)
    model.save_pretrained(tmp_path)
    loaded = rw.PeftModel.from_pretrained(block(), tmp_path)
    here, there = loaded.rank_summary(), model.rank_summary()
    assert [(row.path, row.rank, row.init_r, row.parameters) for row in here.layers] == [
        (row.path, row.rank, row.init_r, row.parameters) for row in there.layers
    ]
    assert loaded.rank_history.records == model.rank_history.records
    assert loaded.allocation_state is None
    plain = rw.get_peft_model(block(), lora(rank_pattern={"first": 5})).rank_summary()
    assert [(row.rank, row.init_r) for row in plain.layers] == [(5, 5), (2, 2)]


@pytest.mark.parametrize(
    "options", [{"target_r": 0.5, "init_r": 2}, {"target_r": 1, "init_lora_weights": True}]
)
def test_an_adapter_that_is_loaded_and_saved_again_keeps_its_history(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Without it, nothing names the layers that ended at rank 0."""
    model = rw.get_peft_model(block(), adalora(**options))
    train(model, 12)
    model.save_pretrained(tmp_path)
    for is_trainable in (False, "init_lora_weights" not in options):
        loaded = rw.PeftModel.from_pretrained(block(), tmp_path, is_trainable=is_trainable)
        loaded.save_pretrained(tmp_path)  # replaces the folder's files
    again = rw.PeftModel.from_pretrained(block(), tmp_path)
    assert again.rank_history.records == model.rank_history.records
    assert [row.rank for row in again.rank_summary().layers] == [
        row.rank for row in model.rank_summary().layers
    ]
