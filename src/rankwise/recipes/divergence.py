"""Telling whether a run has diverged.

A run has diverged if its held-out loss is NaN or infinite, or if its training loss and its held-out loss are both far
above the held-out loss before training. A run that overfits has not diverged: its held-out loss may grow, but its
training loss is small.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.config import CONFIG_NAME
from rankwise.recipes.errors import RecipeError
from rankwise.recipes.output import Output, is_whole
from rankwise.storage import checkpoint_step
from rankwise.storage.finite import holds_finite_adapter

_TIMES, _AT_LEAST, _TIMES_FOR_SURE = 2.0, 0.1, 10.0

Log = Sequence[Mapping[str, Any]]


class DivergedError(RecipeError):
    """A run has diverged, so its adapter is useless.

    Args:
        message: the error message: what happened, and what to do.
        checkpoint: the last checkpoint from before the run diverged, or None.

    Example:
        >>> error = DivergedError("The run has diverged.", checkpoint=None)
        >>> isinstance(error, RecipeError), error.checkpoint
        (True, None)
    """

    def __init__(self, message: str, checkpoint: Path | None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


def highest_sound_loss(before: float | None) -> float:
    """The highest loss with which a run counts as sound.

    This is twice the loss before training, or that loss plus 0.1 if this is more. But it is never more than ten times a
    positive loss before training. It is infinite if the loss before training is unknown or not finite.

    Example:
        >>> highest_sound_loss(3.8), highest_sound_loss(0.02), highest_sound_loss(0.001)
        (7.6, 0.12000000000000001, 0.01)
        >>> highest_sound_loss(None), highest_sound_loss(float("nan"))
        (inf, inf)
    """
    if before is None or not math.isfinite(before):
        return math.inf
    most = max(_TIMES * before, before + _AT_LEAST)
    return min(most, _TIMES_FOR_SURE * before) if before > 0 else most


def last_training_loss(log: Log) -> float | None:
    """The last logged training loss. If none was logged, the mean over all steps, or None if that is missing, too.

    Example:
        >>> last_training_loss([{"loss": 2.0, "step": 1}, {"eval_loss": 1.5, "step": 1}])
        2.0
    """
    for key in ("loss", "train_loss"):
        found = [float(entry[key]) for entry in log if key in entry]
        if found:
            return found[-1]
    return None


def looks_diverged(before: float | None, log: Log) -> bool:
    """Whether the last training loss is too large or not finite. If so, the held-out loss has to decide."""
    loss = last_training_loss(log)
    return loss is not None and not (math.isfinite(loss) and loss <= highest_sound_loss(before))


def has_diverged(before: float | None, after: float | None, log: Log) -> bool:
    """Whether a run has diverged.

    Args:
        before: the held-out loss before training, or None if it is unknown.
        after: the held-out loss after training, or None if it is unknown.
        log: the entries that Transformers' Trainer has logged.

    Example:
        >>> has_diverged(3.8, 431.0, [{"loss": 500.0}]), has_diverged(3.8, 12.0, [{"loss": 0.01}])
        (True, False)
        >>> has_diverged(3.8, float("nan"), [{"loss": 1.0}]), has_diverged(3.8, 1.2, [{"loss": float("inf")}])
        (True, False)
    """
    was_a_number = before is None or math.isfinite(before)
    if after is not None and not math.isfinite(after) and was_a_number:
        return True
    if not looks_diverged(before, log):
        return False
    return after is None or not was_a_number or not after <= highest_sound_loss(before)


def last_sound_step(before: float | None, log: Log) -> int:
    """The last optimizer step with a finite training loss that was not too large, or 0.

    Example:
        >>> last_sound_step(2.0, [{"loss": 1.9, "step": 5}, {"loss": 90.0, "step": 10}])
        5
    """
    most = highest_sound_loss(before)
    steps = [
        int(entry["step"])
        for entry in log
        if "loss" in entry and math.isfinite(entry["loss"]) and entry["loss"] <= most
    ]
    return max(steps, default=0)


def last_sound_checkpoint(output: Output, before: float | None, log: Log) -> Path | None:
    """The newest checkpoint from before the run diverged, or None."""
    last = last_sound_step(before, log)
    return next(
        (
            each
            for each in output.checkpoints()
            if (checkpoint_step(each) or 0) <= last and is_whole(each) and holds_finite_adapter(each)
        ),
        None,
    )


def diverged(output: Output, before: float | None, after: float | None, log: Log) -> DivergedError:
    """Return the error to raise for a run that has diverged. ``after`` is None if weights are NaN or infinite."""
    recipe, loss = output.recipe, last_training_loss(log)
    said = [f"{before:.4g} before training" if before is not None else "not known before training"]
    said.append(
        "can't be measured now, as weights are NaN or infinite" if after is None else f"is {after:.4g} now"
    )
    message = f"The run has diverged: the loss on held-out examples was {said[0]} and {said[1]}"
    message += f" (the last training loss was {loss:.4g}). " if loss is not None else ". "
    checkpoint = last_sound_checkpoint(output, before, log)
    if checkpoint is not None:
        message += f"The last good checkpoint is {str(checkpoint)!r}: a complete adapter like any other. "
    else:
        message += "There is no checkpoint from before that. "
    if before is not None and not math.isfinite(before):
        message += (
            "The loss was not finite before the first step, so no learning rate helps: look for numbers to learn that "
            "are too large (scale them), or set dtype: float32."
        )
        return DivergedError(message, checkpoint)
    lower = recipe.training.learning_rate / 10
    changes = {"training.learning_rate": f"{lower:.3g}", "output": f"{output.folder}-again"}
    kept = [each for each in recipe.overrides if each.partition("=")[0].strip() not in changes]
    program = ["rankwise", "train", str(recipe.source), *kept, *map("=".join, changes.items())]
    saved = (output.folder / CONFIG_NAME).exists()
    message += f"The adapter in {str(output.folder)!r} is of no use. " if saved else "No adapter was saved. "
    message += f"Train again with a lower learning rate:\n\n  {shlex.join(program)}\n"
    return DivergedError(message, checkpoint)
