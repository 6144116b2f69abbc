"""FSDP version 1: plain LoRA trains under it; anything that needs whole matrices is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rankwise as rw
from one_run import launch
from tiny import llama, token_batches


@pytest.mark.slow
def test_plain_lora_trains_and_all_else_is_refused(tmp_path: Path) -> None:
    launch("fsdp1.py", tmp_path)
    first, second = (json.loads((tmp_path / f"process-{number}.json").read_text()) for number in (0, 1))
    assert first == second
    assert first["sharded"]["losses"] == pytest.approx(first["alone"]["losses"], rel=1e-5)
    assert first["sharded"]["last"] == pytest.approx(first["alone"]["last"], rel=1e-5)
    loaded = rw.PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert loaded(**token_batches(1)[0]).loss.item() == pytest.approx(first["sharded"]["last"], rel=1e-5)
    assert "FULL_STATE_DICT" in first["sharded"]["saving"] and not (tmp_path / "bare").exists()
    assert "FSDP version 1" in first["sharded"]["merging"]
    assert "FSDP version 1" in first["refused"]["whole"] and "fully_shard" in first["refused"]["whole"]
    assert "FSDP version 1" in first["refused"]["adalora"] and "fully_shard" in first["refused"]["adalora"]
