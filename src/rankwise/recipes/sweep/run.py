"""Run a sweep: trial after trial of the recipe and of LoRA beside it, until there are as many as asked for."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import TrainerCallback

from rankwise.files.atomic import write_file
from rankwise.recipes.errors import RecipeError, did_you_mean, refusal
from rankwise.recipes.interrupt import Interrupted
from rankwise.recipes.load import load_recipe
from rankwise.recipes.output import flat, settled
from rankwise.recipes.recipe import BaseRecipe
from rankwise.recipes.run import train
from rankwise.recipes.sweep import study as studies
from rankwise.recipes.sweep.outcome import Outcome, Point
from rankwise.recipes.sweep.space import (
    Dimension,
    beside_dimensions,
    beside_overrides,
    check_dimensions,
    override,
    parse_dimension,
    usual_dimensions,
)
from rankwise.recipes.tasks import Metric, load_task
from rankwise.recipes.training import device_problem, processes

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial
    from rich.console import Console

RESULT = "sweep.json"
_KEPT_OF_OTHERS = ("recipe.yaml", "results.json")
_WAIT = 5.0  # seconds between two looks at trials that run elsewhere
_FAILURES = 3  # trials in a row that fail before the sweep gives up


def sweep(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    over: Sequence[str] = (),
    trials: int = 20,
    metric: str = "loss",
    beside: str = "lora",
    within: float = 0.01,
    storage: str | None = None,
    name: str | None = None,
    output: str | Path | None = None,
    sampler: str = "tpe",
    pruner: str = "median",
    overwrite: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Search for the settings with which a recipe's held-out metric is best, beside LoRA at the same parameters.

    Started again, it goes on where it was. Several processes that share a storage share the trials.

    Args:
        recipe: the YAML file.
        overrides: ``key=value`` for it, as in `load_recipe`.
        over: what to vary, each ``key=low..high`` or ``key=value,value``; left out, learning rate and rank.
        trials: how many trials there are to be, those of LoRA included.
        metric: of the task; ``loss`` is the held-out loss.
        beside: ``lora`` to give every second trial to LoRA of the same ranks; ``none`` for the recipe's method alone.
        within: the share of the best value by which a smaller adapter may be worse.
        storage: URL of a storage of Optuna's, which other processes may share: then the sampler is not seeded. None
            for a SQLite file in the output folder.
        name: of the study; None for the output folder's name.
        output: the folder to write; None for the recipe's ``output`` with ``-sweep``.
        sampler: which of Optuna's samplers, one of ``tpe``, ``gp``, ``random``, ``qmc``, ``grid``.
        pruner: which of its pruners, one of ``median``, ``halving``, ``hyperband``, ``none``.
        overwrite: begin anew where there was a sweep of this name.
        console: where to show the trials; None for the standard output.

    Raises:
        RecipeError: the recipe, or something that was asked for, can't be used.
    """
    from rich.console import Console

    started = _Sweep(
        Path(recipe), list(overrides), over, metric, beside, within, trials, output, console or Console()
    )
    started.open(storage, name, sampler, pruner, overwrite)
    return started.run()


class _Sweep:
    def __init__(
        self,
        path: Path,
        overrides: list[str],
        over: Sequence[str],
        metric: str,
        beside: str,
        within: float,
        trials: int,
        output: str | Path | None,
        console: Console,
    ) -> None:
        if processes() > 1:
            raise RecipeError(
                "A sweep is one process for each GPU, which share a storage: start `rankwise sweep` with the same "
                "--storage for each, without torchrun."
            )
        if trials < 1:
            raise refusal("--trials", f"must be at least 1, but is {trials}.")
        if not 0 <= within < 1:
            raise refusal("--within", f"must be from 0 to below 1 (100%), but is {within:g}.")
        if beside not in ("lora", "none"):
            raise refusal("--beside", f"there is no {beside!r}. {did_you_mean(beside, ('lora', 'none'))}")
        # A metric of the sweep is the one by which each trial keeps its best adapter.
        self.recipe = load_recipe(path, overrides)
        self.metric = _metric(self.recipe, metric)
        self.overrides = [*overrides, f"training.metric_for_best_model={metric}"]
        self.path, self.trials, self.within, self.console = path, trials, within, console
        problem = device_problem(self.recipe)
        if problem is not None:
            raise RecipeError([problem], str(path))
        self.dimensions = [parse_dimension(each) for each in over] or usual_dimensions(self.recipe)
        check_dimensions(path, self.overrides, self.dimensions)
        self.folder = Path(output) if output is not None else Path(f"{self.recipe.output}-sweep").expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise refusal("--output", f"{str(self.folder)!r} is a file. Choose another name.")
        self.methods = [self.recipe.method]
        if beside == "lora" and self.recipe.method == "adalora" and trials > 1:
            self.methods.append("lora")
        self.studies: dict[str, Study] = {}
        self.now: dict[str, str] = {}  # what running trials say
        self._refresh: Callable[[], None] = lambda: None

    def open(self, storage: str | None, name: str | None, sampler: str, pruner: str, overwrite: bool) -> None:
        """Open the studies, or go on with them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        opened = studies.open_storage(storage or f"sqlite:///{self.folder / 'sweep.db'}")
        name = name or self.folder.resolve().name
        settings = dict(flat(settled(self.recipe)))
        kept = {key: value for key, value in settings.items() if key not in self.recipe.free_when_resuming}
        for method in self.methods:
            dimensions = self._dimensions(method)
            own = {**kept, "method": method, "metric": self.metric.key}
            self.studies[method] = studies.open_study(
                opened,
                name if method == self.recipe.method else f"{name}, {method}",
                {**own, "over": "; ".join(map(str, dimensions))},
                grows=self.metric.greater_is_better,
                sampler=sampler,
                pruner=pruner,
                seed=None if storage else self.recipe.training.seed,
                trials=self.share(method),
                overwrite=overwrite,
            )
        if overwrite:
            shutil.rmtree(self.folder / "trials", ignore_errors=True)
        for method, study in self.studies.items():
            if not study.get_trials(deepcopy=False) and (own_values := self._own_values(method)):
                study.enqueue_trial(own_values)

    def share(self, method: str) -> int:
        """How many of the trials a method has."""
        place = self.methods.index(method)
        return (self.trials - place + len(self.methods) - 1) // len(self.methods)

    def _dimensions(self, method: str) -> list[Dimension]:
        """What is searched over with a method."""
        return self.dimensions if method == self.recipe.method else beside_dimensions(self.dimensions)

    def _own_values(self, method: str) -> dict[str, Any]:
        """The recipe's own values, with which each method begins; empty if one is not among those searched."""
        settings = dict(flat(self.recipe.plain()))
        if self.recipe.method == "adalora":
            from rankwise.config import AdaLoraConfig

            settings.setdefault("adapter.target_r", AdaLoraConfig().target_r)
        dimensions = self._dimensions(method)
        own = {each.key: settings.get(each.key) for each in dimensions}
        return own if all(each.holds(own[each.key]) for each in dimensions) else {}

    # --- the trials --------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Run trials until there are enough, or a signal comes."""
        with self._shown():
            failures = 0
            while (method := self._next()) is not None:
                if method == "":
                    time.sleep(_WAIT)
                    continue
                study = self.studies[method]
                before = {trial.number for trial in studies.finished(study)}
                try:
                    study.optimize(functools.partial(self._train, method=method), n_trials=1, catch=_Failed)
                except Interrupted as stopped:
                    return self._done(stopped.number)
                new = [trial for trial in studies.finished(study) if trial.number not in before]
                failures = failures + 1 if new and "reason" in new[-1].user_attrs else 0
                self._tidy()
                if failures >= min(_FAILURES, self.trials):
                    raise RecipeError(
                        f"{failures} trials in a row failed, the last one ({new[-1].user_attrs['name']}): "
                        f"{new[-1].user_attrs['reason']}"
                    )
        return self._done(None)

    def _next(self) -> str | None:
        """The method whose trial is next; "" to wait for those elsewhere; None if all are done."""
        waits = False
        wanted: list[tuple[int, int, str]] = []
        for place, (method, study) in enumerate(self.studies.items()):
            studies.try_again(study)
            done, now = len(studies.finished(study)), len(studies.running(study))
            if done + now < self.share(method):
                wanted.append((done + now, place, method))
            waits = waits or (now > 0 and done < self.share(method))
        if wanted:
            return min(wanted)[2]
        return "" if waits else None

    def _train(self, trial: Trial, method: str) -> float:
        """One trial: the value of its metric."""
        import optuna

        trial.set_user_attr("runner", studies.runner())
        name = trial.user_attrs.get("name") or f"{method}-{trial.number}"
        trial.set_user_attr("name", name)
        folder = self.folder / "trials" / name
        dimensions = self._dimensions(method)
        values = {each.key: each.suggest(trial) for each in dimensions}
        self._say(name, "begins")
        began = time.monotonic()
        try:
            made = load_recipe(
                self.path, [*self._overrides(method, values), f"output={json.dumps(str(folder))}"]
            )
            resume = folder.is_dir() and any(folder.glob("checkpoint-*"))
            result = train(
                made, console=_quiet(), resume=resume, overwrite=not resume,
                callbacks=[_Follow(trial, self.metric.key, lambda said: self._say(name, said))], compare=False,
            )  # fmt: skip
        except optuna.TrialPruned:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except Exception as error:
            trial.set_user_attr("reason", (" ".join(str(error).split()) or type(error).__name__)[:500])
            if not isinstance(error, (RecipeError, RuntimeError, ValueError, OSError)):
                raise  # a fault of ours
            raise _Failed(str(error)) from error
        finally:
            self.now.pop(name, None)
            gc.collect()  # of a model that refers to itself
        if result.interrupted is not None:
            raise Interrupted(result.interrupted)
        trial.set_user_attr("seconds", round(time.monotonic() - began, 1))
        trial.set_user_attr("parameters", result.kept_parameters)
        value = float(result.after[self.metric.key])
        worst = -math.inf if self.metric.greater_is_better else math.inf
        return value if math.isfinite(value) else worst

    def _overrides(self, method: str, values: dict[str, Any]) -> list[str]:
        if method == self.recipe.method:
            return [*self.overrides, *(override(key, value) for key, value in values.items())]
        return [*self.overrides, *beside_overrides(self.recipe, values)]

    # --- what is left and shown --------------------------------------------------------------------------------------

    def outcome(self, interrupted: int | None = None) -> Outcome:
        """What it has come to by now."""
        points = [
            _point(trial, method)
            for method, study in self.studies.items()
            for trial in study.get_trials(deepcopy=False)
            if "name" in trial.user_attrs and (trial.state.is_finished() or trial.state.name == "RUNNING")
        ]
        # One that was left behind is tried again, under its name.
        points = [point for point in points if point.state != "failed" or point.reason]
        metric = self.metric
        return Outcome(
            self.folder, metric.key, metric.title, metric.style, metric.greater_is_better, self.within, points,
            interrupted,
        )  # fmt: skip

    def _done(self, number: int | None) -> Outcome:
        outcome = self.outcome(number)
        self._write(outcome)
        return outcome

    def _tidy(self) -> None:
        """Write what there is, and remove the adapters that another one beats; their recipes and results stay."""
        outcome = self.outcome()
        self._write(outcome)
        kept = {point.name for point in outcome.kept}
        for point in outcome.points:
            folder = self.folder / "trials" / point.name
            if point.state == "complete" and point.name not in kept and folder.is_dir():
                for path in folder.iterdir():
                    if path.name not in _KEPT_OF_OTHERS:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._refresh()

    def _write(self, outcome: Outcome) -> None:
        write_file(self.folder / RESULT, json.dumps(outcome.to_dict(), indent=2) + "\n")
        smallest = outcome.smallest
        if smallest is None:
            return
        with contextlib.suppress(OSError):  # of a trial that ran on another machine
            made = yaml.safe_load((self.folder / "trials" / smallest.name / "recipe.yaml").read_text("utf-8"))
            made["output"] = self.recipe.output
            text = yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=100)
            near = f"within {100 * self.within:g} % of the best"
            said = f"# The recipe of {smallest.name}: the smallest adapter {near}.\n"
            write_file(self.folder / "recipe.yaml", said + text)

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """A live table in a terminal; a line for each trial elsewhere."""
        from rich.live import Live

        if not self.console.is_terminal:
            yield
            return
        rows = max(5, self.console.height - 6)
        with Live(console=self.console, refresh_per_second=4) as live:

            def refresh() -> None:
                live.update(self.outcome().table(self.now, rows))

            self._refresh = refresh
            refresh()
            yield
            live.update("")

    def _say(self, name: str, said: str) -> None:
        self.now[name] = said
        if self.console.is_terminal:
            self._refresh()
        elif said == "begins":
            done = sum(len(studies.finished(study)) for study in self.studies.values())
            self.console.print(f"trial {done + 1} of {self.trials}: {name}", highlight=False, soft_wrap=True)


class _Failed(Exception):
    """A trial that can't be trained, for a reason that is noted."""


class _Follow(TrainerCallback):
    """Tells Optuna of each evaluation, and stops a trial that falls behind the others.

    Args:
        trial: of Optuna.
        metric: its name in an evaluation.
        say: shows where the trial is.
    """

    def __init__(self, trial: Trial, metric: str, say: Callable[[str], None]) -> None:
        self.trial, self.metric, self._say = trial, metric, say
        self._shown = -math.inf

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the step, from time to time."""
        if time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            self._say(f"step {state.global_step:,} of {state.max_steps:,}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Report where the metric is, at a share of the run: trials may differ in steps."""
        import optuna

        value = (metrics or {}).get(f"eval_{self.metric}")
        if value is None or not 0 < state.global_step < state.max_steps:
            return
        if math.isfinite(value):
            self.trial.report(float(value), round(100 * state.global_step / state.max_steps))
            if self.trial.should_prune():
                raise optuna.TrialPruned


def _metric(recipe: BaseRecipe, name: str) -> Metric:
    known = {metric.key: metric for metric in load_task(recipe.task).metrics(recipe)}
    known.setdefault("loss", Metric("loss", "held-out loss", greater_is_better=False))
    if name not in known:
        raise refusal(f"--metric {name}", f"{recipe.task} has no such metric. {did_you_mean(name, known)}")
    if recipe.training.evaluates == "no":
        raise refusal("training.eval_strategy", "a sweep compares evaluations. Take `no` out.")
    return known[name]


def _point(trial: FrozenTrial, method: str) -> Point:
    state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name, "running")
    value = trial.value if trial.state.name == "COMPLETE" else None
    if state == "pruned" and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    seconds = trial.user_attrs.get("seconds")
    if seconds is None and trial.duration is not None:
        seconds = trial.duration.total_seconds()
    return Point(
        trial.user_attrs["name"], method, dict(trial.params), state, value,
        trial.user_attrs.get("parameters"), seconds, trial.user_attrs.get("reason"),
    )  # fmt: skip


def _quiet() -> Console:
    from rich.console import Console

    return Console(quiet=True)
