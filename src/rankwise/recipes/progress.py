"""The callbacks of a recipe's run: progress bar, results on disk, sound checkpoints, and stopping on a signal."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from transformers import TrainerCallback

from rankwise.files.tensors import is_finite
from rankwise.integrations.common import run_of
from rankwise.parallel.sharded import shared_out
from rankwise.recipes.interrupt import Interruption
from rankwise.recipes.output import Output


class LiveProgress(TrainerCallback):
    """A bar with step, loss, phase, budget and time left. In a file or a pipe, it is a line for each log entry.

    Args:
        console: the console that shows the bar.
        metrics: the key, title and format of each metric to show after an evaluation.
    """

    def __init__(self, console: Console, metrics: list[tuple[str, str, str]]) -> None:
        self.console = console
        self.metrics = metrics
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._loss: float | None = None

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar. A closed terminal does not end the run."""
        with contextlib.suppress(OSError):
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Show the bar."""
        said = self._said(model)
        self._training = self._bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, said=said
        )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move the bar."""
        if self._training is not None:
            self._bar.update(self._training, completed=state.global_step, said=self._said(model))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Note the loss, and print a line where there is no bar."""
        if "loss" not in (logs or {}):
            return
        self._loss = logs["loss"]
        if not self.console.is_terminal:
            width = len(str(state.max_steps))
            self.say(f"step {state.global_step:>{width}}/{state.max_steps}  {self._said(model)}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the progress of an evaluation."""
        loader = kwargs.get("eval_dataloader")
        if self._evaluation is None:
            total = len(loader) if loader is not None and hasattr(loader, "__len__") else None
            self._evaluation = self._bar.add_task("evaluating", total=total, said="")
        self._bar.advance(self._evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Remove the evaluation's bar. While training, print the metrics."""
        if self._evaluation is not None:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None
        if self._training is not None and metrics:
            shown = ", ".join(
                f"{title} {metrics[f'eval_{key}']:{style}}"
                for key, title, style in self.metrics
                if f"eval_{key}" in metrics
            )
            self.say(f"step {state.global_step:,}: {shown}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar, and leave it on the screen."""
        if self._training is not None:
            self._bar.stop_task(self._training)
            self._training = None

    def _said(self, model: Any) -> str:
        """The loss, phase and budget, as text."""
        parts = [] if self._loss is None else [f"loss {self._loss:.4f}"]
        state = getattr(model, "allocation_state", None)
        if state is not None:
            parts += [str(state.phase), f"budget {state.budget:,}→{state.target:,}"]
        return "  ".join(parts)


class KeepResults(TrainerCallback):
    """Keeps the log and the ranks in ``results.json`` up to date, for `rankwise watch`.

    Args:
        output: the run's output folder.
    """

    every = 2.0  # the least seconds between two writes, so that a run that logs at every step stays fast

    def __init__(self, output: Output) -> None:
        self.output = output
        self._written = -math.inf

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the log and the ranks so far."""
        adapted = run_of(model)
        if adapted is None or "loss" not in (logs or {}):
            return
        ranks = adapted.rank_summary()  # in every process, because it may gather from all of them
        if not state.is_world_process_zero or time.monotonic() - self._written < self.every:
            return
        self._written = time.monotonic()
        now = {
            "steps": state.global_step,
            "total_steps": state.max_steps,
            "ranks": ranks.to_dict(),
            "log": state.log_history,
        }
        with contextlib.suppress(OSError):  # the next checkpoint will report a full disk
            self.output.write_results({**self.output.results, **now, "finished": False})


class KeepGoodCheckpoints(TrainerCallback):
    """Skips checkpoints while the loss is far too large, because each would replace an earlier, good one.

    It also stops a run whose weights have become NaN or infinite, because no step can repair them.

    Args:
        say: a function that prints a line.

    Attributes:
        most: the largest loss with which a checkpoint is written.
        broken: whether weights are NaN or infinite.
    """

    def __init__(self, say: Any) -> None:
        self.most, self.broken = math.inf, False
        self._say, self._loss = say, 0.0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the loss. If it is not finite, check the weights, too: a loss alone may recover."""
        if "loss" not in (logs or {}) or model is None:
            return
        self._loss = logs["loss"]
        if not math.isfinite(self._loss):
            self.broken = _holds_broken_weights(model)
            control.should_training_stop = control.should_training_stop or self.broken
        self._decide(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Skip the checkpoint if the last logged loss is too large."""
        self._decide(state, control)

    def _decide(self, state: Any, control: Any) -> None:
        asked_to_stop = control.should_training_stop and not self.broken  # no later checkpoint will follow
        unsound = not self._loss <= self.most
        if control.should_save and (self.broken or (unsound and not asked_to_stop)):
            control.should_save = False
            self._say(f"No checkpoint of step {state.global_step:,}: the loss is {self._loss:.4g}.")


def _holds_broken_weights(model: Any) -> bool:
    if shared_out(model):
        return False  # each process holds a different part, and all processes must decide alike
    return not all(is_finite(each) for each in model.parameters() if each.requires_grad)


class StopWhenAsked(TrainerCallback):
    """Saves a checkpoint and stops the run after the step in which a signal came.

    Args:
        interruption: the object that notes signals.
        say: a function that prints a line.
        needs_last: a function that returns whether the trainer should evaluate after the last step, too.
    """

    def __init__(self, interruption: Interruption, say: Any, needs_last: Callable[[], bool]) -> None:
        self.interruption = interruption
        self._say = say
        self._needs_last = needs_last

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the training loop has begun, so that signals save a checkpoint."""
        self.interruption.in_loop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop on a signal. At the last step, skip the checkpoint and the evaluation that `train` itself makes."""
        if state.global_step < state.max_steps:
            if self.interruption.agreed() is not None:
                self._stop(state, control)
            return control
        return self._at_the_end(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """At the end of the last epoch, skip the checkpoint and the evaluation that `train` itself makes."""
        return control if state.global_step < state.max_steps else self._at_the_end(control)

    def _at_the_end(self, control: Any) -> Any:
        control.should_save = False
        control.should_evaluate = control.should_evaluate and self._needs_last()
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop on a signal that came during an evaluation while training."""
        if self.interruption.in_loop and self.interruption.agreed() is not None:
            self._stop(state, control)
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the training loop is over, so that signals stop the process at once."""
        self.interruption.in_loop = False

    def _stop(self, state: Any, control: Any) -> None:
        if not control.should_training_stop:
            again = "" if self.interruption.may_repeat else " (A second signal stops without it.)"
            self._say(f"Stopping: saving a checkpoint of step {state.global_step:,}.{again}")
        control.should_save = control.should_training_stop = True
