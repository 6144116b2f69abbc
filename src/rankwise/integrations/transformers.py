"""Transformers' Trainer: the length of the run, metrics in the logs, and checkpoints that resume.

Attaching an adapter to a Transformers model is enough: every Trainer made after it has the callback below among
its default callbacks. It does nothing for models that are not adapted.

Trainer loads an adapter folder only into PEFT's own class; for any other model it looks for full weights. So its
two loading methods are given a way for adapted models. Both are methods that Trainer's documentation invites
subclasses to override.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import trainer as transformers_trainer
from transformers.trainer_callback import TrainerCallback

from rankwise.model import PeftModel
from rankwise.schedule import Phase
from rankwise.storage import WEIGHTS_NAME

_PHASE_NUMBERS = {str(phase): number for number, phase in enumerate(Phase)}


class RankwiseCallback(TrainerCallback):
    """Fits the schedule to the trainer's number of steps, and logs where the ranks are.

    The logs get ``budget`` and ``total_rank`` (triplets), ``rank_phase`` (0 warm-up, 1 pruning, 2 final) and
    ``orth_penalty`` (without its weight).
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Set ``total_step`` where it was left out; warn where it is not the trainer's."""
        adapted = adapted_model(model)
        where = adapted.allocation_state if adapted is not None else None
        if adapted is None or where is None:
            return
        if where.total_step is None:
            adapted.set_total_step(state.max_steps)
        elif where.total_step != state.max_steps:
            warnings.warn(
                f"The schedule is made for total_step={where.total_step}, but this Trainer runs {state.max_steps} "
                "optimizer steps. Leave `total_step` out of AdaLoraConfig to have it fitted.",
                stacklevel=2,
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **unused: Any
    ) -> None:
        """Add the metrics to what is logged of training."""
        adapted = adapted_model(model)
        where = adapted.allocation_state if adapted is not None else None
        if adapted is None or where is None or logs is None or "loss" not in logs:
            return
        metrics = {
            "budget": where.budget,
            "total_rank": adapted.rank_summary().total_rank,
            "rank_phase": _PHASE_NUMBERS[where.phase],
            "orth_penalty": round(float(adapted.orthogonal_penalty()), 6),
        }
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)


def adapted_model(model: Any) -> PeftModel | None:
    """The adapted model inside wrappers such as DistributedDataParallel and ``torch.compile``'s, or None."""
    while isinstance(model, nn.Module) and not isinstance(model, PeftModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model if isinstance(model, PeftModel) else None


def install() -> None:
    """Teach Trainer about adapted models; calling it again does nothing."""
    if RankwiseCallback not in transformers_trainer.DEFAULT_CALLBACKS:
        transformers_trainer.DEFAULT_CALLBACKS.append(RankwiseCallback)
        trainer = transformers_trainer.Trainer
        trainer._load_from_checkpoint = _resuming(trainer._load_from_checkpoint)
        trainer._load_best_model = _loading_best(trainer._load_best_model)


def _resuming(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _load(self, resume_from_checkpoint, self.model if model is None else model):
            original(self, resume_from_checkpoint, model)

    return _load_from_checkpoint


def _loading_best(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_best_model(self: Any) -> None:
        if not _load(self, self.state.best_model_checkpoint, self.model):
            original(self)

    return _load_best_model


def _load(trainer: Any, folder: str, model: Any) -> bool:
    adapted = adapted_model(model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if adapted is None or sharded or not os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
        return False
    adapted.load_checkpoint(folder)
    return True
