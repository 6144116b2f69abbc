"""Keep the best adapter of a run: of all evaluations after the ranks are final, and stop when there is none better.

Before the last phase of AdaLoRA the budget is still coming down, so an adapter of that time is larger than it is to be,
or not yet cut: it is never kept. LoRA's ranks are final from the first step.

output/best-76/      the best adapter so far, with what bringing the model back to it needs
best.json        its step and its metrics; written last, so that a folder without it is not whole
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
    """The best adapter of a run by now.

    Args:
        step: the optimizer step that it is of.
        metric: by which it is the best.
        value: of that metric.
        metrics: all metrics of that evaluation.
        examples: how many held-out examples they are of.
    """

    step: int
    metric: str
    value: float
    metrics: Mapping[str, float]
    examples: int


class KeepBest(TrainerCallback):
    """Saves the adapter of each evaluation that is the best so far, once the ranks are final; and stops early.

    Args:
        recipe: its section ``training`` says what is best, and how long to wait for a better one.
        metrics: of the task.
        folder: the run's output folder.
        examples: how many held-out examples an evaluation while training looks at.
        say: prints a line.
        predicted: gives what was predicted in the last evaluation.
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
        self.prediction: Any = (
            None  # of the best; None if it was kept by the part of the run before it was resumed
        )
        self._predicted = predicted
        self._keys = metric_keys(metrics)
        self._say = say
        self._wanted = training.load_best_model_at_end and training.evaluates != "no"
        self.best: Best | None = None
        # Whether a held-out loss and a log are those of a run that has diverged.
        self.diverged: Callable[[float | None, Any], bool] = lambda loss, log: False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take up what a run that is resumed has kept."""
        if self._wanted and shared_out(model):
            self._wanted = False
            self._say("Processes share out the parameters: the last adapter is kept, whichever is the best.")
        if self._wanted and state.global_step > 0:
            self.best = kept(self.folder)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **kwargs: Any
    ) -> Any:
        """Keep the adapter if it is the best and the run has not diverged; stop if none was better for long enough."""
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
        elif self.patience is not None and self._waited(state) >= self.patience:
            self.stopped = control.should_training_stop = True
            at = "" if self.best is None else f" than at step {self.best.step:,}"
            self._say(f"Stopping: no better {self.metric}{at} in {self._waited(state)} evaluations.")
        return control

    def bring_back(self, model: Any, last_step: int) -> Best | None:
        """Give the model the best adapter, if that is not the one of ``last_step``, which it has.

        Returns:
            The best; None if none was kept, so that the model is as training left it.
        """
        if self.best is not None and self.best.step != last_step:
            try:
                model.load_checkpoint(self.folder / f"{_FOLDER}{self.best.step}")
            except (OSError, ValueError) as error:  # what was trained must not be lost over it
                self._give_up(error)
        return self.best

    def _give_up(self, error: Exception) -> None:
        """Go on without the best adapter: the last one is kept."""
        self.best, self._wanted = None, False
        self._say(f"The best adapter can't be kept, so that the last one will be: {error}")

    def _better(self, value: float, than: float) -> bool:
        return value > than if self.greater else value < than

    def _waited(self, state: Any) -> int:
        """Evaluations since the best one, from the trainer's log, which a resumed run has, too."""
        since = 0 if self.best is None else self.best.step
        logged = [entry["step"] for entry in state.log_history if f"eval_{self.metric}" in entry]
        if self.best is None:  # none was finite yet
            return len(logged)
        return sum(step > since for step in logged)


def ranks_are_final(adapted: Any) -> bool:
    """Whether no later step of the run changes a rank.

    Args:
        adapted: a `rankwise.PeftModel`, or None.
    """
    where = getattr(adapted, "allocation_state", None)
    return where is None or where.initial == where.target or where.phase == Phase.FINAL


def kept(folder: Path) -> Best | None:
    """The newest whole adapter that a run has kept as its best one; None if there is none."""
    for path in sorted(best_folders(folder), key=_step, reverse=True):
        try:
            return Best(**json.loads((path / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return None


def best_folders(folder: Path) -> Iterator[Path]:
    """The folders of best adapters in a run's output folder, whole or not."""
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_dir() and _step(path) > 0)


def _step(path: Path) -> int:
    number = path.name.removeprefix(_FOLDER)
    return int(number) if path.name.startswith(_FOLDER) and number.isdecimal() else 0


def _keep(folder: Path, best: Best, model: Any) -> None:
    """Save an adapter as the best one, and only then remove the one before."""
    place = folder / f"{_FOLDER}{best.step}"
    model.save_pretrained(place, training_state=True, is_main_process=True)
    write_file(place / _FILE, json.dumps(asdict(best), indent=2) + "\n")
    for earlier in best_folders(folder):
        if earlier != place:
            shutil.rmtree(earlier)
