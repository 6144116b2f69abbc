"""The trials of a sweep in Optuna's storage, which several processes and machines may share.

A trial whose process was killed is tried again with the same values and the same name, so that its run continues from
its checkpoint. A trial that failed with an error is not tried again.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.recipes.data.identity import what_changed
from rankwise.recipes.errors import RecipeError, did_you_mean, refusal

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

# Seconds between a process's heartbeats, and seconds without one after which the process counts as dead.
_HEARTBEAT, _GRACE = 15, 60
# Attempts to open a storage, and seconds between two attempts.
_ATTEMPTS, _PAUSE = 5, 0.5
# Seconds to wait for a SQLite file that another process writes to. The default of 5 is too short.
_PATIENCE = 300


def open_storage(url: str) -> Any:
    """Open Optuna's storage at a URL, such as ``sqlite:///sweep.db`` or ``postgresql://user@host/name``.

    Raises:
        RecipeError: the text is no URL, a driver is missing, or the database does not answer.
    """
    import optuna
    import sqlalchemy.exc

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if "://" not in url:
        raise refusal(f"--storage {url}", "is not a URL. A file here is, for example, sqlite:///sweep.db.")
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///").partition("?")[0])
        if not path.parent.is_dir():
            raise refusal(f"--storage {url}", f"there is no folder {str(path.parent)!r}. Make it first.")
    for attempt in itertools.count(1):
        try:
            return _storage(url)
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
            # Two processes may create the tables of a new storage at the same time. The second one fails. When it
            # tries again, it finds the tables.
            clash = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
            if clash and attempt < _ATTEMPTS:
                time.sleep(_PAUSE)
                continue
            message = " ".join(str(getattr(error, "orig", None) or error).split())[:300]
            raise refusal(f"--storage {url}", f"can't be opened: {message}") from error


def _storage(url: str) -> Any:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
        return optuna.storages.RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": _PATIENCE}} if url.startswith("sqlite") else None,
            heartbeat_interval=_HEARTBEAT,
            grace_period=_GRACE,
        )


@contextmanager
def explained() -> Iterator[None]:
    """Turn an error of the storage's database into a `RecipeError` that says what to do."""
    import sqlalchemy.exc

    try:
        yield
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, sqlalchemy.exc.DBAPIError):
            inner = inner.__cause__ or inner.__context__
        if inner is None:
            raise
        raise RecipeError(
            f"The storage of the sweep can't be read or written: {inner.orig}. Set that right (free space on the disk, "
            "or allow writing). Finished trials are kept: the same command continues the sweep."
        ) from error


def open_study(
    storage: Any,
    name: str,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    grows: bool,
    sampler: str,
    pruner: str,
    seed: int | None,
    trials: int,
    overwrite: bool,
) -> Study:
    """Open the study of a name, or create it.

    Args:
        storage: the storage that `open_storage` returned.
        name: the study's name.
        settings: all settings that trials depend on, by name. A study with other settings is refused.
        data: the facts about the data that trials depend on (`facts_of`). A study with other data is refused.
        grows: whether larger values of the metric are better.
        sampler: the name of a sampler in `_sampler`.
        pruner: the name of a pruner in `_pruner`.
        seed: the sampler's seed. None: a different seed in each process, so that two processes draw different values.
        trials: the number of trials that the study will have.
        overwrite: whether to delete an earlier study of this name.

    Raises:
        RecipeError: the study belongs to a sweep with other settings or other data, or is to be deleted while
            another process runs a trial of it.
    """
    import optuna

    names = [each.study_name for each in optuna.get_all_study_summaries(storage)]
    if overwrite and name in names:
        earlier = optuna.load_study(study_name=name, storage=storage)
        try_again(earlier)
        if running(earlier):
            raise RecipeError(
                f"Another process is running a trial of the sweep {name!r}, which --overwrite would delete. Wait for "
                "its end or stop it; or choose another --study or -o."
            )
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
    changed_data = what_changed(study.user_attrs.get("data"), data)
    if changed_data is not None:
        raise RecipeError(
            f"The data of the sweep {name!r} has changed: {changed_data}. Trials on different data can't be compared. "
            "Restore the data, choose another -o, or start again with --overwrite."
        )
    study.set_user_attr("data", dict(data))
    # A sweep that continues must not draw the same values again.
    study.sampler = _sampler(sampler, None if seed is None else seed + len(study.trials), trials)
    return study


def _sampler(name: str, seed: int | None, trials: int) -> Any:
    import optuna

    first = max(3, min(10, trials // 4))  # random trials before the sampler uses earlier results
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

    # The pruners' steps are percents of a run.
    made: Mapping[str, Callable[[], Any]] = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=20),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=10),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=10, max_resource=100),
        "none": lambda: optuna.pruners.NopPruner(),
    }
    return _chosen(made, name, "--pruner")()


def _chosen(made: Mapping[str, Any], name: str, option: str) -> Any:
    if name not in made:
        raise refusal(f"{option} {name}", f"there is no such name. {did_you_mean(name, made)}")
    return made[name]


# --- trials ------------------------------------------------------------------------------------------------------


def runner() -> dict[str, Any]:
    """The identity of this process: host, number and start time. A later process may get the same number."""
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()}


def left_behind(trial: FrozenTrial) -> bool:
    """Whether a trial is marked as running, but its process on this machine is gone."""
    import psutil

    who = trial.user_attrs.get("runner")
    if not who or who.get("host") != socket.gethostname():
        return False  # another machine runs it; if that dies, its heartbeat stops
    try:
        return bool(psutil.Process(who["pid"]).create_time() != who["began"])
    except psutil.NoSuchProcess:
        return True


def try_again(study: Study) -> None:
    """Queue again, under the same names, the trials whose processes were killed."""
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
    """The trials that are done: complete, pruned, or failed with an error."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    return [
        trial
        for trial in study.get_trials(deepcopy=False, states=states)
        if trial.state is not TrialState.FAIL or "reason" in trial.user_attrs
    ]


def running(study: Study) -> list[FrozenTrial]:
    """The trials that are running, in this process or in others."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
