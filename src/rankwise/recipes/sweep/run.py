"""Running a sweep: trials of the recipe in turn with trials of LoRA, until there are as many as asked for."""

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
from rankwise.files.explain import NOT_WRITTEN, errno_of
from rankwise.recipes.console import lasting_console
from rankwise.recipes.data.identity import facts_of
from rankwise.recipes.errors import RecipeError, did_you_mean, refusal
from rankwise.recipes.interrupt import Interrupted
from rankwise.recipes.load import load_recipe
from rankwise.recipes.models import quiet
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
    """Search for the settings that give a recipe's best held-out metric.

    By default, every second trial is LoRA with as many parameters. A sweep that is started again resumes where it
    stopped. Processes that share a storage share the trials.

    Args:
        recipe: the YAML file.
        overrides: ``key=value`` strings for the recipe, as in `load_recipe`.
        over: the keys to vary, each ``key=low..high`` or ``key=value,value``. Empty: learning rate and rank.
        trials: the number of trials in total, those of LoRA included, 1 or more.
        metric: the metric to compare by: ``loss``, which is the held-out loss, or a metric of the task.
        beside: ``lora`` to make every second trial LoRA with the same average rank, or ``none``.
        within: the share of the best value by which a smaller adapter may be worse, from 0 to below 1.
        storage: the URL of an Optuna storage, which other processes may share. The sampler then has no seed. None: a
            SQLite file in the output folder.
        name: the study's name. None: the output folder's name.
        output: the folder to write. None: the recipe's ``output`` with ``-sweep`` appended.
        sampler: the name of Optuna's sampler: ``tpe``, ``gp``, ``random``, ``qmc`` or ``grid``.
        pruner: the name of Optuna's pruner: ``median``, ``halving``, ``hyperband`` or ``none``.
        overwrite: whether to delete an earlier sweep of this name and start over.
        console: the console that shows the trials. None: the standard output.

    Returns:
        The result: all trials, the best one, and the smallest good one.

    Raises:
        RecipeError: the recipe or an argument can't be used, or several trials in a row failed.

    Example:
        >>> import tempfile
        >>> from rich.console import Console
        >>> small = ["data.train_size=32", "data.held_out=16", "training.max_steps=2"]
        >>> over, folder = ["training.learning_rate=1e-3..1e-2"], tempfile.mkdtemp()
        >>> outcome = sweep(
        ...     "recipes/quickstart.yaml", small, over=over, trials=1, output=folder, console=Console(quiet=True)
        ... )
        >>> [point.name for point in outcome.points]
        ['adalora-0']
    """
    started = _Sweep(
        Path(recipe),
        list(overrides),
        over,
        metric,
        beside,
        within,
        trials,
        output,
        console or lasting_console(),
    )
    with studies.explained():
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
                "A sweep has one process for each GPU, and the processes share a storage: start `rankwise sweep` with "
                "the same --storage for each, without torchrun."
            )
        if trials < 1:
            raise refusal("--trials", f"must be at least 1, but is {trials}.")
        if not 0 <= within < 1:
            raise refusal("--within", f"must be from 0 to below 1 (100%), but is {within:g}.")
        if beside not in ("lora", "none"):
            raise refusal("--beside", f"there is no {beside!r}. {did_you_mean(beside, ('lora', 'none'))}")
        # Each trial keeps its best adapter by the sweep's metric.
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
        self.now: dict[str, str] = {}  # the progress of running trials, by name
        self.signal: int | None = None  # the signal that came in the last step of a trial
        self._refresh: Callable[[], None] = lambda: None

    def open(self, storage: str | None, name: str | None, sampler: str, pruner: str, overwrite: bool) -> None:
        """Open new studies, or those of an earlier start of the sweep."""
        self.folder.mkdir(parents=True, exist_ok=True)
        opened = studies.open_storage(storage or f"sqlite:///{self.folder / 'sweep.db'}")
        name = name or self.folder.resolve().name
        with quiet():
            data = load_task(self.recipe.task).read_data(self.recipe)
        facts = facts_of(data.train, data.evaluation, data.labels)
        settings = dict(flat(settled(self.recipe)))
        kept = {key: value for key, value in settings.items() if key not in self.recipe.free_when_resuming}
        for method in self.methods:
            dimensions = self._dimensions(method)
            own = {**kept, "method": method, "metric": self.metric.key}
            self.studies[method] = studies.open_study(
                opened,
                name if method == self.recipe.method else f"{name}, {method}",
                {**own, "over": "; ".join(map(str, dimensions))},
                facts,
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
        """The number of a method's trials."""
        place = self.methods.index(method)
        return (self.trials - place + len(self.methods) - 1) // len(self.methods)

    def _dimensions(self, method: str) -> list[Dimension]:
        """The dimensions to search for a method."""
        return self.dimensions if method == self.recipe.method else beside_dimensions(self.dimensions)

    def _own_values(self, method: str) -> dict[str, Any]:
        """The recipe's own values, for each method's first trial. Empty: the search does not include one of them."""
        settings = dict(flat(self.recipe.plain()))
        if self.recipe.method == "adalora":
            from rankwise.config import AdaLoraConfig

            settings.setdefault("adapter.target_r", AdaLoraConfig().target_r)
        dimensions = self._dimensions(method)
        own = {each.key: settings.get(each.key) for each in dimensions}
        return own if all(each.holds(own[each.key]) for each in dimensions) else {}

    # --- the trials --------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Run trials until there are enough or a signal comes."""
        with self._shown():
            failures = 0
            while (method := self._next()) is not None:
                if self.signal is not None:
                    return self._done(self.signal)
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
        """The method of the next trial; "" to wait for trials of other processes; None if all trials are done."""
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
        """Train one trial, and return the value of its metric."""
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
            if errno_of(error) in NOT_WRITTEN:
                raise  # without a reason, so that the trial is tried again once the disk has space
            trial.set_user_attr("reason", (" ".join(str(error).split()) or type(error).__name__)[:500])
            if not isinstance(error, (RecipeError, RuntimeError, ValueError, OSError)):
                raise  # a fault of rankwise
            raise _Failed(str(error)) from error
        finally:
            self.now.pop(name, None)
            gc.collect()  # frees the model, which refers to itself
        if result.interrupted is not None:
            raise Interrupted(result.interrupted)
        self.signal = result.late_signal
        trial.set_user_attr("seconds", round(time.monotonic() - began, 1))
        trial.set_user_attr("parameters", result.kept_parameters)
        value = float(result.after[self.metric.key])
        worst = -math.inf if self.metric.greater_is_better else math.inf
        return value if math.isfinite(value) else worst

    def _overrides(self, method: str, values: dict[str, Any]) -> list[str]:
        if method == self.recipe.method:
            return [*self.overrides, *(override(key, value) for key, value in values.items())]
        return [*self.overrides, *beside_overrides(self.recipe, values)]

    # --- the result --------------------------------------------------------------------------------------------------

    def outcome(self, interrupted: int | None = None) -> Outcome:
        """The result so far."""
        points = [
            _point(trial, method)
            for method, study in self.studies.items()
            for trial in study.get_trials(deepcopy=False)
            if "name" in trial.user_attrs and (trial.state.is_finished() or trial.state.name == "RUNNING")
        ]
        # A trial that fails without a reason was left behind. It is tried again under the same name.
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
        """Write the result so far, and remove adapters that others beat. Their recipes and results stay."""
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
        with contextlib.suppress(OSError):  # the trial may have run on another machine
            made = yaml.safe_load((self.folder / "trials" / smallest.name / "recipe.yaml").read_text("utf-8"))
            made["output"] = self.recipe.output
            text = yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=100)
            near = f"within {100 * self.within:g} % of the best"
            said = f"# The recipe of {smallest.name}: the smallest adapter {near}.\n"
            write_file(self.folder / "recipe.yaml", said + text)

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """Show a live table in a terminal. In a file or a pipe, each trial prints a line."""
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
            said = f"trial {done + 1} of {self.trials}: {name}"
            self.console.print(said, markup=False, highlight=False, soft_wrap=True)


class _Failed(Exception):
    """A trial failed, for a reason that was noted."""


class _Follow(TrainerCallback):
    """Reports each evaluation to Optuna, and stops a trial that falls behind the others.

    Args:
        trial: Optuna's trial.
        metric: the metric's key.
        say: a function that shows the trial's progress.
    """

    def __init__(self, trial: Trial, metric: str, say: Callable[[str], None]) -> None:
        self.trial, self.metric, self._say = trial, metric, say
        self._shown = -math.inf

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the step, at most twice per second."""
        if time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            self._say(f"step {state.global_step:,} of {state.max_steps:,}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Report the metric at a percentage of the run, because trials may have different numbers of steps."""
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
