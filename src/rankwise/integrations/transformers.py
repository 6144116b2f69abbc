"""Transformers' Trainer: the length of the run, metrics in the logs, and checkpoints that resume.

Attaching an adapter to a Transformers model is enough: every Trainer made after it has the callback below among
its default callbacks. It does nothing for models that are not adapted.

Trainer loads an adapter folder only into PEFT's own class; for any other model it looks for full weights. So its
two loading methods are given a way for adapted models; and `log`, which knows the trackers, sends them the ranks. All
are methods that Trainer's documentation invites subclasses to override.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from transformers import trainer as transformers_trainer
from transformers.trainer_callback import TrainerCallback

from rankwise.adapt.ranks import AdaptiveRanks
from rankwise.integrations.common import (
    fit_total_step,
    own_model,
    rank_metrics,
    run_of,
    warn_if_unfinished,
)
from rankwise.integrations.trackers import RankPictures
from rankwise.integrations.trl import (
    check_new_trainer,
    check_reference_in_use,
    explain_foreign_configurations,
)
from rankwise.storage import WEIGHTS_NAME


class RankwiseCallback(TrainerCallback):
    """Fits the schedule to the trainer's number of steps, and logs where the ranks are.

    The logs get ``budget`` and ``total_rank`` (triplets), ``rank_phase`` (0 warm-up, 1 pruning, 2 final); and
    ``orth_penalty`` (without its weight) where there is a penalty.
    """

    _reference_given = False  # the caller gave the trainer a reference model
    _under_way = False  # training has begun and not ended: when it begins again, an attempt was given up
    _fitted = False  # the length of the run is the trainer's

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Teach kinds of Trainer that were imported after the model was adapted; refuse what would train wrongly."""
        install()
        self._reference_given = check_new_trainer(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Set ``total_step`` where it was left out; warn where it is not the trainer's."""
        check_reference_in_use(model, self._reference_given)
        adapted = own_model(model)
        controller = adapted._rankwise_controller if adapted is not None else None
        if controller is None:
            return
        if self._under_way and not state.global_step:  # as with `auto_find_batch_size`
            length = controller.config.total_step
            controller.begin_anew(state.max_steps if self._fitted or length is None else length)
        else:
            self._fitted = controller.config.total_step is None
        self._under_way = True
        fit_total_step(adapted, state.max_steps, "Trainer")

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Warn if the run has ended before the budget has come down."""
        self._under_way = False
        warn_if_unfinished(own_model(model))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **unused: Any
    ) -> None:
        """Add the metrics to what is logged of training."""
        add_metrics(state, logs, model)


def add_metrics(state: Any, logs: Any, model: Any) -> None:
    """Add where the ranks are to what a trainer logs of training."""
    run = run_of(model)
    if run is None or logs is None or "loss" not in logs:
        return
    metrics = rank_metrics(run)
    logs.update(metrics)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(metrics)


def install() -> None:
    """Teach Trainer, and all of its subclasses that exist by now, about adapted models; as often as you like."""
    if RankwiseCallback not in transformers_trainer.DEFAULT_CALLBACKS:
        transformers_trainer.DEFAULT_CALLBACKS.append(RankwiseCallback)
    explain_foreign_configurations()
    for trainer in _with_subclasses(transformers_trainer.Trainer):
        _replace(trainer, "_load_from_checkpoint", _resuming)
        _replace(trainer, "_load_best_model", _loading_best)
    _replace(transformers_trainer.Trainer, "log", _picturing)  # subclasses' own call it


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    subclasses: list[type] = cls.__subclasses__()
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _replace(cls: type, name: str, wrap: Callable[[Any], Any]) -> None:
    original = vars(cls).get(name)
    if original is not None and not hasattr(original, "_rankwise_wraps"):
        made = wrap(original)
        made._rankwise_wraps = original
        setattr(cls, name, made)


def _resuming(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_from_checkpoint(
        self: Any, resume_from_checkpoint: str, *args: Any, model: Any = None, **kwargs: Any
    ) -> None:
        given = {} if model is None else {"model": model}
        target = next(iter(args), model)
        target = self.model if target is None else target
        if _load(self, resume_from_checkpoint, target):
            return
        try:
            original(self, resume_from_checkpoint, *args, **given, **kwargs)
        except RuntimeError as error:
            run = run_of(target)
            if not isinstance(run, AdaptiveRanks) or not run.is_over or "size mismatch" not in str(error):
                raise
            raise ValueError(
                f"{resume_from_checkpoint} was written before the run of adaptive ranks ended. By now the layers are "
                "narrowed, and have fewer ranks than it. To go on from it, load the base model and attach the adapter "
                "anew, as before the first training."
            ) from None

    return _load_from_checkpoint


def _loading_best(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_best_model(self: Any) -> None:
        if not _load(self, self.state.best_model_checkpoint, self.model):
            original(self)

    return _load_best_model


def _picturing(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        original(self, logs, *args, **kwargs)
        pictures = vars(self).get("_rankwise_pictures") or RankPictures(self)
        self._rankwise_pictures = pictures
        pictures.after_log(logs)

    return log


def _load(trainer: Any, folder: str, model: Any) -> bool:
    adapted = own_model(model)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if adapted is None or sharded:
        return False
    places = (folder, *(os.path.join(folder, name) for name in adapted.peft_config))
    if not any(os.path.isfile(os.path.join(place, WEIGHTS_NAME)) for place in places):
        return False
    adapted.load_checkpoint(folder)
    return True
