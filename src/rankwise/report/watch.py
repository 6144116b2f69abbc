"""The state of a run in another process, read from its output folder: step, loss, budget and ranks."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.config import CONFIG_NAME
from rankwise.files.locks import TRAINING
from rankwise.report.inspect import inspect_adapter
from rankwise.report.runs import json_object, read_log
from rankwise.run.summary import LayerRank, RankSummary
from rankwise.storage import checkpoint_step

RESULTS = "results.json"  # `rankwise train` updates it during the run


@dataclass(frozen=True)
class RunNow:
    """The state of a run.

    Args:
        step: the last optimizer step that the folder records.
        total_steps: the number of optimizer steps in the run, if the folder records it.
        ranks: the rank of every layer; None before the first record.
        log: the logged entries, each with its ``step``.
        finished: whether the run is finished.
        source: the file or folder that this was read from.
        age: the seconds since the source was written.
        stopped: whether `rankwise train` has left the run unfinished: after Ctrl-C, or because it diverged.
    """

    step: int
    total_steps: int | None
    ranks: RankSummary | None
    log: list[dict[str, Any]]
    finished: bool
    source: Path
    age: float
    stopped: bool = False

    def line(self) -> str:
        """Summarize the state in one line: step, losses, budget, age."""
        last = {key: value for entry in self.log for key, value in entry.items()}
        parts = [f"step {self.step:,}" + (f" of {self.total_steps:,}" if self.total_steps else "")]
        parts += [
            f"{said} {last[key]:.4f}"
            for key, said in (("loss", "loss"), ("eval_loss", "held out"))
            if key in last
        ]
        if "budget" in last:
            parts.append(f"budget {last['budget']:,.0f}")
        written = f"written {_ago(self.age)}"
        state = "finished" if self.finished else f"stopped, {written}" if self.stopped else written
        return ", ".join([*parts, state])


def read_run_now(folder: str | os.PathLike[str]) -> RunNow:
    """Read a run's state from its output folder: that of ``rankwise train``, or of any trainer with checkpoints.

    Raises:
        ValueError: the folder does not exist, holds nothing of a run, or holds a sweep.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {folder}. Give the run's output folder, once the run has begun."
        )
    if (folder / "sweep.json").is_file():
        raise ValueError(
            f"{folder} holds a sweep, whose command shows its trials. To watch one of them, give its folder in "
            f"{folder / 'trials'}."
        )
    # Before the results: a run that ends between the two is finished.
    idle = not (folder / TRAINING).exists()
    results = json_object(folder / RESULTS)
    checkpoint = _newest_checkpoint(folder)
    stopped = idle and results.get("finished") is False
    step = results.get("steps")
    own = isinstance(step, int) and (checkpoint is None or step >= (checkpoint_step(checkpoint) or 0))
    if own and (ranks := _summary(results.get("ranks"))) is not None:
        return RunNow(
            int(results["steps"]),
            _whole(results.get("total_steps")),
            ranks,
            read_log(results.get("log")),
            results.get("finished") is True,
            folder / RESULTS,
            _age(folder / RESULTS),
            stopped,
        )
    if checkpoint is not None:
        return _of_adapter(checkpoint, finished=False, stopped=stopped)
    if (folder / CONFIG_NAME).is_file():
        return _of_adapter(folder, finished=True)
    if results or (folder / "recipe.yaml").is_file():
        return RunNow(0, None, None, [], False, folder, _age(folder), stopped)
    raise ValueError(
        f"{folder} holds nothing of a run: it has no {RESULTS} of `rankwise train`, no checkpoint and no adapter. Give "
        "the `output` of a recipe, or a trainer's `output_dir` that has a checkpoint."
    )


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: the trainer's state, the file written last, is there."""
    steps = {path: checkpoint_step(path) for path in folder.iterdir()}
    whole = {
        path: step
        for path, step in steps.items()
        if step is not None and (path / "trainer_state.json").is_file() and (path / CONFIG_NAME).is_file()
    }
    return max(whole, key=whole.__getitem__, default=None)


def _of_adapter(folder: Path, finished: bool, stopped: bool = False) -> RunNow:
    report = inspect_adapter(folder)
    state = json_object(folder / "trainer_state.json")
    records = report.history.records if report.history is not None else []
    step = _whole(state.get("global_step")) or (records[-1].step if records else 0)
    log, total = read_log(state.get("log_history")), _whole(state.get("max_steps"))
    return RunNow(step, total, report.summary(), log, finished, folder, _age(folder), stopped)


def _summary(data: Any) -> RankSummary | None:
    """Rebuild a summary from `RankSummary.to_dict`; None for any other data."""
    try:
        layers = [
            LayerRank(
                str(each["path"]),
                int(each["rank"]),
                int(each["init_r"]),
                math.nan if each["importance"] is None else float(each["importance"]),
                int(each["parameters"]),
            )
            for each in data["layers"]
        ]
        return RankSummary(layers, int(data["budget"]))
    except (KeyError, TypeError, ValueError):
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _age(path: Path) -> float:
    return max(0.0, time.time() - path.stat().st_mtime)


def _ago(seconds: float) -> str:
    """Format how long ago something happened, for people.

    Example:
        >>> _ago(3.2), _ago(150), _ago(9000)
        ('3 s ago', '2 min ago', '2 h ago')
    """
    if seconds < 100:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 6000 else f"{seconds / 3600:.0f} h ago"
