"""The trials of a sweep in Optuna's storage, which several processes and machines may share.

A trial that a process left behind when it was killed is tried again with the same values, under the same name, so that
its run goes on from its checkpoint. One that failed for a reason of its own is not.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.recipes.errors import RecipeError, did_you_mean, refusal

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_HEARTBEAT, _GRACE = 15, 60  # seconds: how often a process says that it lives, and how long it may be silent
_ATTEMPTS, _PAUSE = 5, 0.5  # to open a storage, and the seconds between two attempts
_PATIENCE = 300  # seconds to wait for a SQLite file that another process writes to; 5, the default, is short


def open_storage(url: str) -> Any:
    """Optuna's storage at a URL, such as ``sqlite:///sweep.db`` or ``postgresql://user@host/name``.

    Raises:
        RecipeError: it is no URL, a driver is missing, or nobody answers there.
    """
    import sqlalchemy.exc

    if "://" not in url:
        raise refusal(f"--storage {url}", "is no URL. Say for instance sqlite:///sweep.db, for a file here.")
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///").partition("?")[0])
        if not path.parent.is_dir():
            raise refusal(f"--storage {url}", f"there is no folder {str(path.parent)!r}. Make it first.")
    for attempt in itertools.count(1):
        try:
            return _storage(url)
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
            # Two processes may make the tables of a new storage at once. The second one fails, and finds the tables
            # when it tries again.
            clash = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
            if clash and attempt < _ATTEMPTS:
                time.sleep(_PAUSE)
                continue
            message = " ".join(str(getattr(error, "orig", None) or error).split())[:300]
            raise refusal(f"--storage {url}", f"can't be opened: {message}") from error


def _storage(url: str) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
        return optuna.storages.RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": _PATIENCE}} if url.startswith("sqlite") else None,
            heartbeat_interval=_HEARTBEAT,
            grace_period=_GRACE,
        )


def open_study(
    storage: Any,
    name: str,
    settings: Mapping[str, Any],
    *,
    grows: bool,
    sampler: str,
    pruner: str,
    seed: int | None,
    trials: int,
    overwrite: bool,
) -> Study:
    """The study of a name: the one that is there, if it is of the same sweep.

    Args:
        storage: of `open_storage`.
        name: of the study.
        settings: all that trials depend on, by names; a study of other settings is refused.
        grows: whether the metric is to be large.
        sampler: one of those that `_sampler` makes.
        pruner: one of those that `_pruner` makes.
        seed: of the sampler; None for one that differs in each process, so that two do not draw the same values.
        trials: how many there are to be.
        overwrite: begin anew.

    Raises:
        RecipeError: the study is of another sweep.
    """
    import optuna

    names = [each.study_name for each in optuna.get_all_study_summaries(storage)]
    if overwrite and name in names:
        optuna.delete_study(study_name=name, storage=storage)
        names.remove(name)
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        direction="maximize" if grows else "minimize",
        load_if_exists=True,
        pruner=_pruner(pruner),
    )
    known = study.user_attrs.get("settings")
    if known is not None:
        changed = [
            f"{key} was {known.get(key)!r} and is {settings.get(key)!r} now"
            for key in dict.fromkeys([*known, *settings])
            if known.get(key) != settings.get(key)
        ]
        if changed:
            raise RecipeError(
                f"The sweep {name!r} had other settings: {'; '.join(changed)}. Set them back, choose another "
                "--study or -o, or start again with --overwrite."
            )
    else:
        study.set_user_attr("settings", dict(settings))
    # A sweep that goes on must not draw the same values again.
    study.sampler = _sampler(sampler, None if seed is None else seed + len(study.trials), trials)
    return study


def _sampler(name: str, seed: int | None, trials: int) -> Any:
    import optuna

    first = max(3, min(10, trials // 4))  # trials before the sampler has something to go by
    made: Mapping[str, Callable[[], Any]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=first, multivariate=True),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=first),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "qmc": lambda: optuna.samplers.QMCSampler(seed=seed or 0, warn_asynchronous_seeding=False),
        "grid": lambda: optuna.samplers.BruteForceSampler(seed=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _chosen(made, name, "--sampler")()


def _pruner(name: str) -> Any:
    import optuna

    # Steps are percent of a run.
    made: Mapping[str, Callable[[], Any]] = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=20),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=10),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=10, max_resource=100),
        "none": lambda: optuna.pruners.NopPruner(),
    }
    return _chosen(made, name, "--pruner")()


def _chosen(made: Mapping[str, Any], name: str, option: str) -> Any:
    if name not in made:
        raise refusal(f"{option} {name}", f"there is none of this name. {did_you_mean(name, made)}")
    return made[name]


# --- trials ------------------------------------------------------------------------------------------------------


def runner() -> dict[str, Any]:
    """Who runs a trial: this process, told apart from a later one of the same number."""
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()}


def left_behind(trial: FrozenTrial) -> bool:
    """Whether a trial that counts as running was one of a process of this machine that is gone."""
    import psutil

    who = trial.user_attrs.get("runner")
    if not who or who.get("host") != socket.gethostname():
        return False  # another machine's, whose heart stops beating if it dies
    try:
        return bool(psutil.Process(who["pid"]).create_time() != who["began"])
    except psutil.NoSuchProcess:
        return True


def try_again(study: Study) -> None:
    """Queue the trials anew that a process left behind, under their names."""
    import optuna
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if left_behind(trial):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    queued = set(study.user_attrs.get("tried again", ()))
    for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        if "reason" not in trial.user_attrs and trial.number not in queued and trial.params:
            queued.add(trial.number)
            study.set_user_attr("tried again", sorted(queued))
            study.enqueue_trial(trial.params, user_attrs={"name": trial.user_attrs.get("name")})


def finished(study: Study) -> list[FrozenTrial]:
    """The trials that are done: complete, pruned, or failed for a reason of their own."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    return [
        trial
        for trial in study.get_trials(deepcopy=False, states=states)
        if trial.state is not TrialState.FAIL or "reason" in trial.user_attrs
    ]


def running(study: Study) -> list[FrozenTrial]:
    """The trials that run now, here or elsewhere."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
