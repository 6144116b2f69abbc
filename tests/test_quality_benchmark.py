"""benchmarks/quality: what it counts, what it compares, and that a run trains what it says."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "quality"
MODULES = ("language", "methods", "registry", "results", "run", "sentences", "speech", "tasks")

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="benchmarks/ is not part of this copy")


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark's modules, which are scripts in a folder and no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import methods
    import registry
    import results
    import sentences

    import run

    yield SimpleNamespace(methods=methods, registry=registry, results=results, run=run, sentences=sentences)
    for name in MODULES:
        sys.modules.pop(name, None)


def losses(quality: Any, **by_method: dict[float, list[float]]) -> dict[Any, dict[str, Any]]:
    """Results of one task and rank, by method and rate, one for each seed."""
    return {
        quality.results.Run("task", method, 2, rate, seed): {"loss": loss, "parameters": 10}
        for method, rates in by_method.items()
        for rate, found in rates.items()
        for seed, loss in enumerate(found)
    }


def test_results_survive_a_line_that_a_kill_cut_off(quality: Any, tmp_path: Path):
    file = tmp_path / "results.jsonl"
    whole, cut = (quality.results.Run("task", "PEFT LoRA", 2, 5e-4, seed) for seed in range(2))
    quality.results.append(whole, {"loss": 0.5}, file)
    quality.results.append(cut, {"loss": 0.4}, file)
    file.write_text(file.read_text()[:-9])
    assert list(quality.results.read(file)) == [whole]


def test_the_table_has_means_standard_errors_and_all_single_runs(quality: Any):
    found = losses(quality, rankwise={5e-4: [1.0, 2.0, 3.0], 1e-3: [0.5], 2e-3: [0.7]})
    row = quality.results.tables(found, [0, 1, 2]).splitlines()[-1]
    assert row == "| rankwise | 10 | 2.0000 ± 0.5774 | 1.0000, 2.0000, 3.0000 | 0.5000 (1 run) at 0.001 |"


def test_pairs_have_the_same_data_and_count_relative_differences(quality: Any):
    found = losses(quality, rankwise={5e-4: [0.8, 1.1]}, LoRA={5e-4: [1.0, 1.0, 1.0], 1e-3: [9.0]})
    differences, said = quality.results.against(found, "rankwise", "LoRA")
    assert differences == pytest.approx([0.2, -0.1])
    assert "lower by 5.0% on average" in said and "lower in 1 of 2 pairs" in said


def test_tuned_pairs_have_each_method_at_its_own_best_rate(quality: Any):
    found = losses(
        quality,
        rankwise={5e-4: [1.0], 1e-3: [0.8, 0.6], 2e-3: [0.9]},
        LoRA={5e-4: [1.2, 0.1], 1e-3: [1.1], 2e-3: [1.0, 1.0]},
    )
    differences, said = quality.results.against(found, "rankwise", "LoRA", tuned_on=0)
    assert differences == pytest.approx([0.2, 0.4])
    assert "each at its best rate of the grid" in said
    assert quality.results.against(found, "rankwise", "LoRA", rank=8)[0] == []
    row = quality.results.grid(found, 0).splitlines()[-1]
    assert row == "| task, 2, rankwise | 1.0000 | 0.8000 | 0.9000 |"


def test_a_diverged_run_is_never_the_best_of_the_grid(quality: Any):
    found = losses(quality, LoRA={5e-4: [1.0], 1e-3: [0.9], 2e-3: [float("nan")]})
    assert quality.results.best_rate(found, "task", "LoRA", 2, 0) == 1e-3
    found.popitem()
    assert quality.results.best_rate(found, "task", "LoRA", 2, 0) is None


def test_every_run_is_wanted_once_all_seeds_at_the_ordinary_rate_first(quality: Any):
    asked = argparse.Namespace(tasks=["task"], methods=["LoRA"], ranks=[2], seeds=[0, 1], grid=True)
    found = losses(quality, LoRA={5e-4: [1.0], 1e-3: [0.9], 2e-3: [0.8]})
    wanted = [(run.rate, run.seed) for run in quality.run.wanted(asked, found)]
    assert wanted[:2] == [(5e-4, 0), (5e-4, 1)]
    assert wanted[-1] == (2e-3, 1)  # the best rate of the first seed, for the others
    asked.grid = False
    assert [(run.rate, run.seed) for run in quality.run.wanted(asked, found)] == [(5e-4, 0), (5e-4, 1)]


def test_the_tables_of_what_has_been_run_need_no_data():
    told = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--tables"], capture_output=True, text=True, check=True
    )
    assert "**rankwise** against **PEFT LoRA**:" in told.stdout


def test_a_missing_source_is_named():
    told = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--reviews", "nothing.csv"], capture_output=True, text=True
    )
    assert told.returncode == 2 and "--reviews must name a file that exists, not nothing.csv" in told.stderr


def test_the_documentation_has_the_tables_of_what_has_been_run(quality: Any):
    page = (FOLDER.parent.parent / "docs" / "quality.md").read_text(encoding="utf-8").splitlines()
    report = quality.results.report(quality.results.read(), [0, 1, 2])
    assert [line for line in report.splitlines() if line and line not in page] == []


@pytest.mark.slow
def test_all_methods_train_on_the_same_data_to_the_same_number_of_parameters(
    quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reviews = tmp_path / "reviews.csv"
    with reviews.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "rating"))
        for number in range(600):
            good = number % 2
            writer.writerow((f"film {number} is {'warm and witty' if good else 'dull'}", 3 if good else -3))
    monkeypatch.setattr(quality.sentences, "_STEPS", 16)
    monkeypatch.setattr(quality.sentences, "_HELD_OUT", 100)
    sources = quality.run.Sources(reviews)
    parameters = {}
    for method in quality.methods.METHODS:
        measured = quality.run.train(quality.results.Run("movie-rating", method, 2, 1e-3, 0), sources)
        assert 0 < measured["loss"] < 3, method
        parameters[method] = measured["parameters"]
    lora = parameters["PEFT LoRA"]
    assert lora == 2 * 6 * (4 * (384 + 384) + 2 * (384 + 1536))
    for method, count in parameters.items():
        if "AdaLoRA" in method or "EVA" in method or "paper" in method:
            # They count ranks, be they of wide layers or of narrow ones.
            assert lora / 3 < count < 3 * lora, method
        elif method.startswith("rankwise"):
            assert 0.9 * lora < count <= lora, method
        else:
            assert count == lora, method
