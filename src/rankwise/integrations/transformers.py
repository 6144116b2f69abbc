"""Transformers' Trainer: the schedule gets the length of the run, the logs get metrics, and checkpoints resume.

Attaching an adapter to a Transformers model is enough: every Trainer made after it has the callback below among
its default callbacks. The callback does nothing for models that are not adapted.

Trainer loads an adapter folder only into PEFT's own class. For any other model it looks for full weights. So this
module replaces its two loading methods by ones that also load adapted models. It also replaces the method `log`, so
that trackers get the ranks. Trainer's documentation invites subclasses to override all three.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from transformers import trainer as transformers_trainer
from transformers.trainer_callback import TrainerCallback

from rankwise.adapt.peft_pairs import lora_model
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
    """Sets the schedule to the trainer's number of optimizer steps, and logs the state of the ranks.

    The logs get ``budget`` and ``total_rank`` in ranks, and ``rank_phase`` (0 warm-up, 1 pruning, 2 final). A run with
    an orthogonality penalty also logs ``orth_penalty``, the penalty without its weight.
    """

    _reference_given = False  # whether the caller gave the trainer a reference model
    _under_way = False  # whether training has begun and not ended
    _fitted = False  # whether the schedule took the length of the run from the trainer

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Extend subclasses of Trainer that were imported late, and refuse trainers that would train wrongly."""
        install()
        self._reference_given = check_new_trainer(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Set ``total_step`` if it was left out. Warn if it differs from the trainer's number of steps."""
        check_reference_in_use(model, self._reference_given)
        adapted = own_model(model)
        controller = adapted._rankwise_controller if adapted is not None else None
        if controller is None:
            return
        if self._under_way and not state.global_step:  # a new attempt, as with `auto_find_batch_size`
            length = controller.config.total_step
            controller.begin_anew(state.max_steps if self._fitted or length is None else length)
        else:
            self._fitted = controller.config.total_step is None
        self._under_way = True
        fit_total_step(adapted, state.max_steps, "Trainer")

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Warn if the run has ended before the budget reached its target."""
        self._under_way = False
        warn_if_unfinished(own_model(model))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **unused: Any
    ) -> None:
        """Add the metrics to the logs of training."""
        add_metrics(state, logs, model)


def add_metrics(state: Any, logs: Any, model: Any) -> None:
    """Add the metrics of the ranks to a trainer's log of training."""
    run = run_of(model)
    if run is None or logs is None or "loss" not in logs:
        return
    metrics = rank_metrics(run)
    logs.update(metrics)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(metrics)


def install() -> None:
    """Extend Trainer and all subclasses that exist now, so that they handle adapted models. Repeated calls are fine."""
    if RankwiseCallback not in transformers_trainer.DEFAULT_CALLBACKS:
        transformers_trainer.DEFAULT_CALLBACKS.append(RankwiseCallback)
    explain_foreign_configurations()
    for trainer in _with_subclasses(transformers_trainer.Trainer):
        _replace(trainer, "_load_from_checkpoint", _resuming)
        _replace(trainer, "_load_best_model", _loading_best)
    _replace(transformers_trainer.Trainer, "log", _picturing)  # the methods of subclasses call this one


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
        if not _load(self, resume_from_checkpoint, target):
            original(self, resume_from_checkpoint, *args, **given, **kwargs)

    return _load_from_checkpoint


def _loading_best(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_best_model(self: Any) -> None:
        folder = self.state.best_model_checkpoint
        if not (_load(self, folder, self.model) or _load_named_adapter(self, folder, self.model)):
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


def _load_named_adapter(trainer: Any, folder: str, model: Any) -> bool:
    """Load the best checkpoint's values of a PEFT adapter whose ranks adapt and whose name is not "default".

    PEFT saves such an adapter in a folder of its own. Trainer reads only the file of the adapter "default", and loads
    it into any active adapter.
    """
    run = run_of(model)
    if not isinstance(run, AdaptiveRanks) or run.is_over or not run._trains or _is_sharded(trainer):
        return False
    place = os.path.join(folder, run.adapter)
    if not os.path.isfile(os.path.join(place, WEIGHTS_NAME)):
        return False
    found: Any = lora_model(model)
    found.load_adapter(place, run.adapter)
    return True


def _is_sharded(trainer: Any) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _load(trainer: Any, folder: str, model: Any) -> bool:
    adapted = own_model(model)
    if adapted is None or _is_sharded(trainer):
        return False
    places = (folder, *(os.path.join(folder, name) for name in adapted.peft_config))
    if not any(os.path.isfile(os.path.join(place, WEIGHTS_NAME)) for place in places):
        return False
    adapted.load_checkpoint(folder)
    return True
