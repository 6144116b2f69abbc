"""A sweep finds better settings than the recipe's, compares LoRA of the same size, and loses no trial if killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback
from typer.testing import CliRunner

from command_world import running, wait_for_line
from rankwise.cli import app
from rankwise.recipes import RecipeError, load_recipe
from rankwise.recipes.sweep import Outcome, parse_dimension, sweep
from rankwise.recipes.sweep.outcome import Point
from rankwise.recipes.sweep.space import beside_overrides, override, usual_dimensions
from rankwise.recipes.sweep.study import open_storage, runner
from recipe_world import write_recipe, write_table

optuna = pytest.importorskip("optuna")
RATE = "training.learning_rate=1e-3..1e-1"
RANK = "adapter.target_r=1,2,4"


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    """A recipe whose learning rate is far too low."""
    write_table(tmp_path / "reviews.csv", 90)
    adapter = {"target_modules": ["query", "value"], "target_r": 2}
    return write_recipe(tmp_path, tiny_model, adapter=adapter, schedule=None, training__learning_rate=1e-3,
                        training__eval_steps=3, training__per_device_train_batch_size=16)  # fmt: skip


def run(recipe: Path, *over: str, **options: Any) -> Outcome:
    return sweep(recipe, over=over, console=Console(quiet=True), **options)


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Outcome]:
    """A sweep of eight trials, without a pruner."""
    folder = tmp_path_factory.mktemp("swept")
    write_table(folder / "reviews.csv", 90)
    adapter = {"target_modules": ["query", "value"], "target_r": 2}
    path = write_recipe(folder, tiny_model, adapter=adapter, schedule=None, training__learning_rate=1e-3)
    return path, run(path, RATE, RANK, trials=8, pruner="none")


def test_a_sweep_finds_a_better_setting_than_the_recipes(swept: tuple[Path, Outcome]) -> None:
    _, outcome = swept
    own = next(point for point in outcome.points if point.name == "adalora-0")
    assert own.values == {"training.learning_rate": 1e-3, "adapter.target_r": 2}
    best = outcome.best("adalora")
    assert best is not None and best.value is not None and own.value is not None
    assert best.value < 0.95 * own.value
    assert len(outcome.points) == 8 and all(point.counts for point in outcome.points)


def test_the_lora_it_is_compared_with_has_as_many_parameters_and_trials(swept: tuple[Path, Outcome]) -> None:
    """They are equal except for E, one number per rank, which AdaLoRA's files may hold."""
    path, outcome = swept
    of = {
        method: [point for point in outcome.points if point.method == method]
        for method in ("adalora", "lora")
    }
    assert len(of["adalora"]) == len(of["lora"]) == 4
    sizes = {
        method: {point.values["adapter.target_r"]: point.parameters or 0 for point in points}
        for method, points in of.items()
    }
    for rank in sizes["adalora"].keys() & sizes["lora"].keys():
        assert sizes["lora"][rank] <= sizes["adalora"][rank] <= sizes["lora"][rank] + 4 * rank
    for point in of["lora"]:
        config = path.parent / "out-sweep" / "trials" / point.name / "recipe.yaml"
        assert (
            "method: lora" in config.read_text()
            and f"r: {point.values['adapter.target_r']}" in config.read_text()
        )


def test_the_frontier_and_the_smallest_are_what_their_definitions_say(swept: tuple[Path, Outcome]) -> None:
    _, outcome = swept
    points = [(point.parameters or 0, point.value or 0.0, point.name) for point in outcome.points]
    beaten = {
        name for size, value, name in points for other, better, _ in points
        if other <= size and better <= value and (other, better) != (size, value)
    }  # fmt: skip
    assert {point.name for point in outcome.frontier} == {name for *_, name in points} - beaten
    best = min(value for _, value, _ in points)
    expected = min(size for size, value, _ in points if value <= best * 1.01)
    assert outcome.smallest is not None and outcome.smallest.parameters == expected


def test_the_adapters_that_are_kept_load_and_the_recipe_repeats_the_smallest(
    swept: tuple[Path, Outcome],
) -> None:
    from rankwise.recipes import train
    from rankwise.report.inspect import inspect_adapter

    path, outcome = swept
    folder = path.parent / "out-sweep"
    with_adapter = {each.parent.name for each in folder.glob("trials/*/adapter_config.json")}
    assert with_adapter == {point.name for point in outcome.kept}
    for name in with_adapter:
        assert inspect_adapter(folder / "trials" / name).layers
    smallest = outcome.smallest
    assert smallest is not None
    made = load_recipe(folder / "recipe.yaml", [f"output={path.parent}/again"])
    assert train(made, console=Console(quiet=True)).after["loss"] == pytest.approx(smallest.value, rel=1e-6)


def test_a_sweep_that_is_started_again_only_adds_missing_trials(swept: tuple[Path, Outcome]) -> None:
    path, outcome = swept
    again = run(path, RATE, RANK, trials=8, pruner="none")
    assert [point.name for point in again.points] == [point.name for point in outcome.points]
    assert [point.value for point in again.points] == [point.value for point in outcome.points]


def test_other_settings_under_the_same_name_are_refused_by_key(swept: tuple[Path, Outcome]) -> None:
    path, _ = swept
    with pytest.raises(RecipeError, match="training.max_steps was 10 and is 4 now.*--overwrite"):
        sweep(path, ["training.max_steps=4"], over=[RATE, RANK], trials=9, console=Console(quiet=True))
    with pytest.raises(RecipeError, match="over was .* and is .* now"):
        run(path, RATE, trials=9)


def test_a_sweep_does_not_go_on_with_other_data(recipe: Path) -> None:
    run(recipe, RATE, trials=1)
    table = recipe.parent / "reviews.csv"
    same = table.read_text()
    write_table(table, 120)
    with pytest.raises(RecipeError, match=r"data of the sweep .* has changed: 72 .*--overwrite"):
        run(recipe, RATE, trials=2)
    table.write_text(same)
    assert len(run(recipe, RATE, trials=2).points) == 2


def test_the_report_shows_the_sweep(swept: tuple[Path, Outcome], tmp_path: Path) -> None:
    path, outcome = swept
    code, _, err = call("report", path.parent / "out-sweep", "-o", tmp_path / "sweep.html")
    assert code == 0, err
    page = (tmp_path / "sweep.html").read_text()
    assert "What the sweep found" in page
    for point in outcome.points:
        assert point.name in page and f"{point.value:.4f}" in page


def test_the_command_prints_trials_frontier_and_what_to_do_next(swept: tuple[Path, Outcome]) -> None:
    path, outcome = swept
    words = ("sweep", path, "--over", RATE, "--over", RANK, "--trials", "8", "--pruner", "none")
    code, out, err = call(*words)
    assert code == 0, err
    best, smallest = outcome.best(), outcome.smallest
    assert best is not None and smallest is not None
    for said in (*(point.name for point in outcome.points), "frontier", "Best of AdaLoRA", "Best of LoRA",
                 f"rankwise train {path.parent}/out-sweep/recipe.yaml", f"trials/{smallest.name}"):  # fmt: skip
        assert said in out, said
    code, out, _ = call(*words, "--json")
    assert code == 0 and json.loads(out)["best"] == best.name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_a_sweep_that_is_stopped_and_started_again_ends_with_the_same_trials(
    recipe: Path, number: signal.Signals
) -> None:
    total, at = 4, random.Random(number).randint(2, 4)  # a different trial for each way to stop
    words = ("sweep", recipe, "--over", RATE, "--trials", total, "training.max_steps=60")
    with running(*words, stderr=subprocess.STDOUT) as process:
        wait_for_line(process, f"trial {at} of {total}")
        time.sleep(0.7)  # during the trial
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), out
    storage = open_storage(f"sqlite:///{recipe.parent}/out-sweep/sweep.db")
    before = finished_trials(storage)
    assert len(before) >= at - 1
    outcome = sweep(recipe, ["training.max_steps=60"], over=[RATE], trials=total, console=Console(quiet=True))
    assert len(outcome.points) == total
    assert len({point.name for point in outcome.points}) == total
    after = finished_trials(storage)
    assert before.items() <= after.items() and len(after) == total
    assert sum(point.method == "lora" for point in outcome.points) == 2


def test_a_signal_in_the_last_step_of_a_trial_stops_the_sweep(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial is finished, because nothing but its result is missing."""

    class Signals(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("rankwise.recipes.sweep.run._Follow", lambda *args: Signals())
    outcome = run(recipe, RATE, trials=3)
    assert outcome.interrupted == signal.SIGTERM
    assert [point.state for point in outcome.points] == ["complete"]


def finished_trials(storage: Any) -> dict[str, float]:
    studies = [optuna.load_study(study_name=each.study_name, storage=storage) for each in
               optuna.get_all_study_summaries(storage)]  # fmt: skip
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return {
        trial.user_attrs["name"]: trial.value
        for study in studies
        for trial in study.get_trials(states=states)
    }


def open_at_once(together: Any, urls: Sequence[str]) -> None:
    for url in urls:
        together.wait(60)
        open_storage(url)


@pytest.mark.slow
def test_processes_that_start_together_can_all_open_a_new_storage(tmp_path: Path) -> None:
    """Each process finds the file empty, and only one can create its tables."""
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    urls = [f"sqlite:///{tmp_path}/{number}.db" for number in range(8)]
    processes = [context.Process(target=open_at_once, args=(together, urls)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.slow
def test_two_processes_share_the_trials_of_one_storage(recipe: Path) -> None:
    storage = f"sqlite:///{recipe.parent}/shared.db"
    words = ("sweep", recipe, "--over", RATE, "--trials", 6, "--storage", storage, "--study", "ours")
    with ExitStack() as stack:
        both = [
            stack.enter_context(running(*words, "-o", recipe.parent / name, stderr=subprocess.STDOUT))
            for name in ("one", "two")
        ]
        said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (
        6 <= len(finished_trials(open_storage(storage))) <= 7
    )  # both may begin the last trial at the same moment
    places = [{path.name for path in (recipe.parent / name / "trials").iterdir()} for name in ("one", "two")]
    assert places[0] and places[1] and not places[0] & places[1]


def test_a_trial_that_falls_behind_is_stopped_and_counts(recipe: Path) -> None:
    """Some learning rates are so low that nothing is learned."""
    outcome = sweep(
        recipe, ["training.max_steps=12"], over=["training.learning_rate=1e-7..1e-1"], trials=8, beside="none",
        sampler="random", output=recipe.parent / "more", console=Console(quiet=True),
    )  # fmt: skip
    pruned = [point for point in outcome.points if point.state == "pruned"]
    assert len(outcome.points) == 8 and pruned
    best = outcome.best()
    assert best is not None and best.value is not None
    assert all(point.value is not None and point.value > best.value for point in pruned)
    assert not any((recipe.parent / "more" / "trials" / point.name).exists() for point in pruned)


def test_a_trial_that_cannot_be_trained_is_noted_and_the_others_go_on(recipe: Path) -> None:
    """A rank above the initial one is valid by itself, but not with the other value of another key."""
    outcome = run(
        recipe, "adapter.init_r=2,8", "adapter.target_r=1,4", trials=4, beside="none", sampler="grid"
    )
    failed = [point for point in outcome.points if point.state == "failed"]
    assert failed and all("`init_r`=2" in (point.reason or "") for point in failed)
    assert all(point.values == {"adapter.init_r": 2, "adapter.target_r": 4} for point in failed)
    assert any(point.counts for point in outcome.points)


@pytest.mark.slow
def test_a_sweep_is_not_deleted_while_another_process_runs_it(recipe: Path, tmp_path: Path) -> None:
    run(recipe, RATE, trials=1, beside="none", output=tmp_path / "swept")
    study = optuna.load_study(study_name="swept", storage=f"sqlite:///{tmp_path / 'swept' / 'sweep.db'}")
    trial = study.ask()
    trial.set_user_attr("runner", runner())  # of this process, which lives
    with pytest.raises(RecipeError, match="Another process is running a trial of the sweep 'swept'"):
        run(recipe, RATE, trials=1, beside="none", output=tmp_path / "swept", overwrite=True)
    assert (tmp_path / "swept" / "trials" / "adalora-0" / "adapter_config.json").is_file()
    trial.set_user_attr("runner", {**runner(), "began": 0.0})  # of a process that is gone
    outcome = run(recipe, RATE, trials=1, beside="none", output=tmp_path / "swept", overwrite=True)
    assert [point.state for point in outcome.points] == ["complete"]


@pytest.mark.slow
def test_a_trial_that_a_full_disk_ends_is_tried_again(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("rankwise.recipes.run.save", full)
        code, _, said = call("sweep", recipe, "--over", RATE, "--trials", "1")
        assert code == 2 and "the same command continues the sweep" in said
    outcome = run(recipe, RATE, trials=1)
    assert [point.state for point in outcome.points] == ["complete"]


@pytest.mark.slow
def test_a_storage_that_cannot_be_written_is_the_users_problem(recipe: Path, tmp_path: Path) -> None:
    run(recipe, RATE, trials=1, beside="none", output=tmp_path / "swept")
    with closing(sqlite3.connect(tmp_path / "swept" / "sweep.db", isolation_level=None)) as base:
        base.execute(
            "CREATE TRIGGER full BEFORE INSERT ON trials BEGIN SELECT RAISE(FAIL, 'disk is full'); END"
        )
    with pytest.raises(RecipeError, match="can't be read or written: disk is full"):
        run(recipe, RATE, trials=2, beside="none", output=tmp_path / "swept")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"over": ["data.held_out=5,10"]}, "data.held_out can't be varied: results on other data"),
        ({"over": ["output=a,b"]}, "output can't be varied"),
        ({"over": ["training.seed=1..5"]}, "training.seed can't be varied"),
        ({"over": ["training.logging_steps=1,2"]}, "can't be varied: it changes no result"),
        ({"over": ["adapter.method=lora,adalora"]}, "--beside lora trains LoRA, too"),
        ({"over": ["training.learning_rat=1e-4..1e-2"]}, "Did you mean 'learning_rate'?"),
        ({"over": ["adapter.target_r=0..4"]}, "the value 0 can't be used"),
        ({"over": ["training.learning_rate=1e-2..1e-4"]}, "the range is empty"),
        ({"over": ["training.learning_rate=a..b"]}, "is not a number"),
        ({"over": ["training.learning_rate=1e-3"]}, "has one value"),
        ({"over": ["training.learning_rate"]}, "say what to vary"),
        ({"over": ["adapter.target_r=[1"]}, "is not a list of values"),
        ({"over": [RATE, RATE]}, "is given twice"),
        ({"metric": "acuracy"}, "has no such metric. Did you mean 'accuracy'?"),
        ({"storage": "sweep.db"}, "is not a URL"),
        ({"storage": "sqlite:////nowhere/at/all/sweep.db"}, "there is no folder '/nowhere/at/all'"),
        ({"storage": "postgresql://127.0.0.1:9/none"}, "can't be opened"),
        ({"storage": "nosuch://x/y"}, "can't be opened"),
        ({"sampler": "tpa"}, "Did you mean 'tpe'?"),
        ({"pruner": "medan"}, "Did you mean 'median'?"),
        ({"beside": "rslora"}, "there is no 'rslora'"),
        ({"trials": 0}, "must be at least 1"),
        ({"within": 1.5}, "must be from 0 to below 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value),
)
def test_impossible_searches_are_refused_before_any_trial(
    recipe: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as error:
        sweep(recipe, console=Console(quiet=True), **options)
    assert said in str(error.value)
    assert not (recipe.parent / "out-sweep" / "trials").exists()


def test_a_recipe_of_lora_is_compared_with_nothing(recipe: Path) -> None:
    adapter = ["adapter.method=lora", "~adapter.target_r", "adapter.r=2"]
    outcome = sweep(recipe, adapter, over=["adapter.r=1,2"], trials=2, console=Console(quiet=True))
    assert {point.method for point in outcome.points} == {"lora"}


def test_a_metric_that_grows_is_searched_upwards(recipe: Path) -> None:
    outcome = run(recipe, RATE, trials=3, metric="accuracy", beside="none", pruner="none")
    best = outcome.best()
    assert best is not None and best.value == max(point.value or 0 for point in outcome.points)
    results = json.loads((recipe.parent / "out-sweep" / "trials" / best.name / "results.json").read_text())
    assert results["best"] is None or results["best"]["metric"] == "accuracy"


def test_the_default_search_space_lies_around_the_recipe(recipe: Path) -> None:
    rate, rank = usual_dimensions(load_recipe(recipe))
    assert (rate.low, rate.high, rate.log) == (1e-4, 1e-2, True)
    assert rank.key == "adapter.target_r" and rank.choices == (1, 2, 4, 8)
    (_, rank) = usual_dimensions(load_recipe(recipe, ["adapter.init_r=4"]))
    assert rank.choices == (1, 2, 4)  # at most the recipe's initial rank


@pytest.mark.parametrize(
    "value", [1e-5, 3e-4, 0.1, 123456.789, 1e-12, 5, True, "cosine", '["query", "value"]']
)
def test_a_value_reaches_the_recipe_as_it_is(value: Any) -> None:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(OmegaConf.from_dotlist([override("a.b", value)]))["a"]["b"]
    assert found == (json.loads(value) if str(value).startswith("[") else value)
    assert type(found) is type(value) or isinstance(found, list)


def test_lora_keeps_the_scale_of_adalora(recipe: Path) -> None:
    """lora_alpha is derived from the rank, as in AdaLoRA's default; or from the recipe's value."""
    for given, expected in (([], 2.0), (["adapter.lora_alpha=12"], 12 / 4)):
        own = load_recipe(recipe, given)
        made = load_recipe(recipe, [*given, *beside_overrides(own, {"adapter.target_r": 4})])
        assert made.method == "lora"
        assert made.adapter["lora_alpha"] / made.adapter["r"] == expected


def test_ranges_and_lists_are_read_as_they_are_meant() -> None:
    assert parse_dimension("adapter.target_r=1..8").ends == (1, 8)
    assert isinstance(parse_dimension("adapter.target_r=1..8").low, int)
    assert not parse_dimension("adapter.lora_dropout=0..0.3").log
    assert parse_dimension("training.learning_rate=1e-4, 1e-3").choices == (1e-4, 1e-3)
    assert parse_dimension("adapter.target_modules=[query],[query, value]").choices == (
        '["query"]',
        '["query", "value"]',
    )


def test_an_outcome_without_a_finished_trial_is_reported(tmp_path: Path) -> None:
    point = Point("adalora-0", "adalora", {}, "failed", None, None, 1.0, "no memory")
    outcome = Outcome(tmp_path, "loss", "held-out loss", ".4f", False, 0.01, [point])
    assert list(outcome.lines()) == ["No trial was trained to its end."]
    assert outcome.frontier == [] and outcome.smallest is None
    json.dumps(outcome.to_dict())
