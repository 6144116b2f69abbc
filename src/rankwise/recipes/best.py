"""Keeping the best adapter of a run, and stopping the run when the adapter no longer improves.

Only adapters with final ranks are kept. Before AdaLoRA's final phase the budget is still falling, so an adapter is
larger than the target. LoRA's ranks are final from the first step.

output/best-76/      the best adapter so far, with its training state
best.json            its step and metrics, written last: a folder without this file is incomplete
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rankwise.files.atomic import write_file
from rankwise.integrations.common import own_model
from rankwise.method.schedule import Phase
from rankwise.parallel.sharded import shared_out
from rankwise.recipes.recipe import BaseRecipe
from rankwise.recipes.tasks import Metric
from rankwise.recipes.training import is_main_process, metric_keys

_FOLDER, _FILE = "best-", "best.json"


@dataclass(frozen=True)
class Best:
    """The best adapter of a run so far.

    Args:
        step: the optimizer step of the adapter.
        metric: the metric that decides which adapter is the best.
        value: the value of that metric.
        metrics: all metrics of the evaluation.
        examples: the number of held-out examples in the evaluation.
    """

    step: int
    metric: str
    value: float
    metrics: Mapping[str, float]
    examples: int


class KeepBest(TrainerCallback):
    """Saves the adapter after an evaluation with final ranks, if it is the best so far. May stop the run early.

    Args:
        recipe: the run's recipe. Its section ``training`` says which adapter is best, and when to stop early.
        metrics: the task's metrics.
        folder: the run's output folder.
        examples: the number of held-out examples in an evaluation while training.
        say: a function that prints a line.
        predicted: a function that returns the predictions of the last evaluation.
    """

    def __init__(
        self,
        recipe: BaseRecipe,
        metrics: Sequence[Metric],
        folder: Path,
        examples: int,
        say: Any,
        predicted: Callable[[], Any] = lambda: None,
    ) -> None:
        training = recipe.training
        self.metric = training.metric_for_best_model
        self.patience = training.early_stopping_patience
        task_says = next((each.greater_is_better for each in metrics if each.key == self.metric), False)
        self.greater = task_says if training.greater_is_better is None else training.greater_is_better
        self.folder, self.examples = folder, examples
        self.stopped = False
        # The best adapter's predictions. None: it was saved before the run was resumed.
        self.prediction: Any = None
        self._predicted = predicted
        self._keys = metric_keys(metrics)
        self._say = say
        self._wanted = training.load_best_model_at_end and training.evaluates != "no"
        self.best: Best | None = None
        # Tells from a held-out loss and the log whether the run has diverged.
        self.diverged: Callable[[float | None, Any], bool] = lambda loss, log: False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the best adapter that was kept before the run was resumed."""
        if self._wanted and shared_out(model):
            self._wanted = False
            self._say(
                "The parameters are sharded over the processes, so the last adapter is kept instead of the best."
            )
        if self._wanted and state.global_step > 0:
            self.best = kept(self.folder)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **kwargs: Any
    ) -> Any:
        """Keep the adapter if it is the best and the run has not diverged. Stop the run if patience has run out."""
        adapted: Any = own_model(model)
        value = (metrics or {}).get(f"eval_{self.metric}")
        if not self._wanted or state.global_step == 0 or value is None or not ranks_are_final(adapted):
            return control
        if self.diverged(metrics.get("eval_loss"), state.log_history):
            return control
        if math.isfinite(value) and (self.best is None or self._better(value, self.best.value)):
            found = {key: float(metrics[f"eval_{key}"]) for key in self._keys if f"eval_{key}" in metrics}
            self.best = Best(state.global_step, self.metric, float(value), found, self.examples)
            self.prediction = self._predicted()
            if is_main_process():
                try:
                    _keep(self.folder, self.best, adapted)
                except OSError as error:  # a full disk must not end the run
                    self._give_up(error)
        elif self.patience is not None and (waited := self._waited(state, adapted)) >= self.patience:
            self.stopped = control.should_training_stop = True
            at = "" if self.best is None else f" than at step {self.best.step:,}"
            self._say(f"Stopping: no better {self.metric}{at} in {waited} evaluations.")
        return control

    def bring_back(self, model: Any, last_step: int) -> Best | None:
        """Load the best adapter into the model, unless it is the adapter of ``last_step``, which the model has.

        Returns:
            The best adapter's facts. None: no adapter was kept, and the model is as training left it.
        """
        if self.best is not None and self.best.step != last_step:
            try:
                model.load_checkpoint(self.folder / f"{_FOLDER}{self.best.step}")
            except (OSError, ValueError) as error:  # this must not lose the trained adapter
                self._give_up(error)
        return self.best

    def _give_up(self, error: Exception) -> None:
        """Continue without the best adapter. The last one will be kept."""
        self.best, self._wanted = None, False
        self._say(f"The best adapter can't be kept, so the last one will be: {error}")

    def _better(self, value: float, than: float) -> bool:
        return value > than if self.greater else value < than

    def _waited(self, state: Any, adapted: Any) -> int:
        """The number of evaluations since the best one, by the trainer's log. A resumed run keeps this log.

        If no evaluation has given a finite value yet, it counts those since the last cut.
        """
        if self.best is not None:
            since = self.best.step
        else:
            history = getattr(adapted, "rank_history", None)
            since = max(history.records[-1].step - 1, 0) if history else 0
        logged = (entry["step"] for entry in state.log_history if f"eval_{self.metric}" in entry)
        return sum(step > since for step in logged)


def ranks_are_final(adapted: Any) -> bool:
    """Whether no later step of the run changes a rank.

    Args:
        adapted: a `rankwise.PeftModel`, or None.
    """
    where = getattr(adapted, "allocation_state", None)
    return where is None or where.initial == where.target or where.phase == Phase.FINAL


def kept(folder: Path) -> Best | None:
    """The newest complete best adapter in a run's output folder, or None."""
    for path in sorted(best_folders(folder), key=_step, reverse=True):
        try:
            return Best(**json.loads((path / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return None


def best_folders(folder: Path) -> Iterator[Path]:
    """The folders of best adapters in a run's output folder, complete or not."""
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_dir() and _step(path) > 0)


def _step(path: Path) -> int:
    number = path.name.removeprefix(_FOLDER)
    return int(number) if path.name.startswith(_FOLDER) and number.isdecimal() else 0


def _keep(folder: Path, best: Best, model: Any) -> None:
    """Save an adapter as the best one, then remove the previous one."""
    place = folder / f"{_FOLDER}{best.step}"
    model.save_pretrained(place, training_state=True, is_main_process=True)
    write_file(place / _FILE, json.dumps(asdict(best), indent=2) + "\n")
    for earlier in best_folders(folder):
        if earlier != place:
            shutil.rmtree(earlier)
