"""Lightning: the schedule gets the length of the run, and the logs get the state of the ranks.

Users pass nothing to a Lightning Trainer. The Trainer takes callbacks from packages that offer them by the entry points
"lightning.pytorch.callbacks_factory" and "pytorch_lightning.callbacks_factory", as rankwise does. The callback does
nothing for modules without an adapted model.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from rankwise.adapt import AdaptiveRanks
from rankwise.integrations.common import fit_total_step, rank_metrics, run_of, warn_if_unfinished

_KEY = "rankwise_adaptive_ranks"  # key of the run in a checkpoint


class RankwiseHooks:
    """The methods of the callback. They serve both of Lightning's packages."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set ``total_step`` if it was left out. Warn if it differs from the trainer's number of steps.

        Raises:
            ValueError: ``total_step`` was left out, and the trainer runs without an end.
        """
        run = run_of(pl_module)
        where = run.allocation_state if run is not None else None
        if run is None or where is None:
            return
        if isinstance(run, AdaptiveRanks):
            if run.is_over:
                return
            run.leave_the_end_to(trainer=True)
        steps = trainer.estimated_stepping_batches
        if math.isfinite(steps):
            fit_total_step(run, int(steps), "Lightning Trainer")
        elif where.total_step is None and where.target < where.initial:
            raise ValueError(
                "The Trainer runs without an end, so the schedule cannot be fitted to its length: pass `max_epochs` or "
                "`max_steps` to the Trainer, or `total_step` to AdaLoraConfig or `adapt_ranks`."
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Log the metrics of `rank_metrics` at the trainer's logging steps."""
        step = trainer.global_step
        if not trainer.loggers or not step or step % trainer.log_every_n_steps:
            return
        run = run_of(pl_module)
        metrics = rank_metrics(run) if run is not None else {}
        if metrics and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put a run on PEFT's layers into a checkpoint. The model's state already holds one on rankwise's layers."""
        run = run_of(pl_module)
        if isinstance(run, AdaptiveRanks) and not run.is_over:
            checkpoint[_KEY] = run.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Resume the run from a checkpoint, after the trainer has loaded the factors.

        Raises:
            ValueError: the checkpoint holds no run, or a run on other layers.
        """
        run = run_of(pl_module)
        if not isinstance(run, AdaptiveRanks):
            return
        if _KEY not in checkpoint:
            raise ValueError(
                "This checkpoint holds no state of adaptive ranks, so the run can't continue from it: it was written "
                "without `adapt_ranks`, or after the run was over."
            )
        run.load_state_dict(checkpoint[_KEY])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Narrow PEFT's layers to the ranks that are left. Warn if the budget has not reached its target."""
        run = run_of(pl_module)
        if isinstance(run, AdaptiveRanks):
            run.end()
        else:
            warn_if_unfinished(run)


@functools.cache
def callback_class(base: type) -> type:
    """Make the callback's class from the ``Callback`` class of one of Lightning's two packages."""
    return type("RankwiseCallback", (RankwiseHooks, base), {"__module__": __name__})


def callbacks() -> list[Any]:
    """Return the callbacks for the entry point of ``lightning``."""
    from lightning.pytorch import Callback

    return [callback_class(Callback)()]


def callbacks_of_pytorch_lightning() -> list[Any]:
    """Return the callbacks for the entry point of ``pytorch_lightning``."""
    from pytorch_lightning import Callback

    return [callback_class(Callback)()]
