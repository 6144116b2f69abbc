"""The callback `AdaptRanks`: adaptive ranks on PEFT's LoRA in Transformers' Trainer and its subclasses."""

from __future__ import annotations

import base64
import json
import os
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import nn
from transformers.trainer_callback import ExportableState, TrainerCallback

from rankwise.adapt.peft_pairs import lora_model
from rankwise.adapt.ranks import HANDLES, AdaptiveRanks, adapt_ranks, check_adaptable
from rankwise.adapt.refusals import check_model, check_trains, chosen_adapter
from rankwise.config import AdaLoraConfig
from rankwise.integrations.common import fit_total_step, own_model
from rankwise.integrations.transformers import add_metrics, install
from rankwise.storage.names import HISTORY_NAME

_STATE_FILE = "trainer_state.json"


class AdaptRanks(TrainerCallback, ExportableState):
    """Adapts the ranks of a LoRA adapter of PEFT while a trainer trains it; see `rankwise.adapt_ranks`.

    Pass it in ``callbacks`` to Transformers' Trainer or to one of its subclasses, such as those of TRL and
    sentence-transformers. The number of optimizer steps is the trainer's. The logs get ``budget``, ``total_rank`` and
    ``rank_phase`` (0 warm-up, 1 pruning, 2 final). Checkpoints hold the run in ``trainer_state.json``, so a resumed run
    equals an uninterrupted one bit for bit. When training ends, the layers are narrowed to the ranks that are left.
    Save the adapter after that (``trainer.save_model()``).

    Args:
        target_r: average rank at the end, greater than 0 and at most the rank of the adapter. None: half of it.
        adapter: name of the adapter. None: the active one.
        tinit: length of the warm-up, in optimizer steps (int) or as a fraction of the run (float in [0, 1)). None: 2 %
            of the run.
        tfinal: length of the final phase, in which no rank changes, in optimizer steps (int) or as a fraction of the
            run (float in [0, 1)). None: 60 % of the run.
        deltaT: optimizer steps between two cuts, at least 1. None: the number that gives twenty cuts.

    Raises:
        TypeError: an argument has the wrong type. Or, when the trainer is made or begins to train: as
            `rankwise.adapt_ranks`.
        ValueError: no run can have such numbers. Or, when the trainer is made or begins to train: as
            `rankwise.adapt_ranks`.

    Example:
        >>> callback = AdaptRanks(target_r=4)
        >>> callback.ranks is None  # the handle is there once training has begun
        True
    """

    def __init__(
        self,
        target_r: float | None = None,
        adapter: str | None = None,
        tinit: int | float | None = None,
        tfinal: int | float | None = None,
        deltaT: int | None = None,
    ) -> None:
        self._settings: dict[str, Any] = {
            "target_r": target_r,
            "adapter": adapter,
            "tinit": tinit,
            "tfinal": tfinal,
            "deltaT": deltaT,
        }
        rank = 1 if target_r is None else target_r
        AdaLoraConfig(target_r=rank, tinit=tinit, tfinal=tfinal, deltaT=deltaT)  # refuses impossible numbers
        self.ranks: AdaptiveRanks | None = None  # the handle on the run, once training has begun
        self._by_command = False  # whether a command runs the trainer, so that no script can call the handle

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Refuse an adapter that cannot be adapted as soon as the trainer is made."""
        install()
        found = lora_model(model)
        if found is None and own_model(model) is not None:
            check_model(own_model(model))
        handle = None if found is None else self._handle_of(found)
        if found is not None and (handle is None or handle.is_over):
            check_adaptable(found, self._settings["adapter"], self._settings["target_r"])

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Start the run, or resume it from the checkpoint."""
        found = lora_model(model)
        target = model if found is None else found
        ranks = self._handle_of(target)
        if ranks is not None and ranks.is_over:
            if ranks is self.ranks:
                warnings.warn(
                    "The run of adaptive ranks is over, so the ranks stay as they are, and their values continue to "
                    "train. To adapt them further, make a trainer with a new `AdaptRanks`.",
                    stacklevel=2,
                )
                return
            ranks.detach()
            ranks = None
        if found is not None:
            check_trains(
                found, chosen_adapter(found, self._settings["adapter"]) if ranks is None else ranks.adapter
            )
        if ranks is None:
            length = None if state.global_step else state.max_steps  # a checkpoint brings its own
            ranks = adapt_ranks(target, total_step=length, **self._settings)
        elif not state.global_step:
            # A trainer has given up an attempt, for example because its batch was too large.
            ranks.begin_anew(state.max_steps)
        ranks.leave_the_end_to(trainer=True, handle=None if self._by_command else "callback.ranks")
        self.ranks = ranks
        if state.global_step:
            _load(ranks, state.stateful_callbacks, f"The checkpoint of step {state.global_step}")
            fit_total_step(ranks, state.max_steps, "Trainer")
        state.stateful_callbacks.setdefault(type(self).__name__, {})

    def _handle_of(self, model: Any) -> AdaptiveRanks | None:
        """The run of the adapter, if it has one.

        Raises:
            ValueError: the run has not ended, and has other settings than this callback.
        """
        handles = vars(model).get(HANDLES, {}) if isinstance(model, nn.Module) else {}
        if not handles or self.ranks in handles.values():
            return self.ranks if handles else None
        handle = handles.get(chosen_adapter(model, self._settings["adapter"]))
        if handle is not None and not handle.is_over and not handle._has_settings(self._settings):
            raise ValueError(
                f"The ranks of adapter {handle.adapter!r} adapt already, in a run that has not ended and has other "
                "settings than this `AdaptRanks`. End that run first: call `finalize_ranks()` of its handle, which "
                "after a trainer is `callback.ranks`. Or continue it: give this trainer the same callback."
            )
        return handle

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **unused: Any
    ) -> None:
        """Add the state of the ranks to the logs of training."""
        add_metrics(state, logs, model)

    def on_save(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Write the history of the ranks into the checkpoint, for ``rankwise report``."""
        self._write_history(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)

    def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Narrow the layers to the ranks that are left."""
        if self.ranks is None or self.ranks.is_over:
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and best != os.path.join(args.output_dir, f"checkpoint-{state.global_step}"):
            file = Path(best) / _STATE_FILE
            try:  # the trainer has loaded that checkpoint's factors
                saved = json.loads(file.read_text(encoding="utf-8"))
                _load(self.ranks, saved.get("stateful_callbacks", {}), str(file))
            except (OSError, ValueError) as error:
                warnings.warn(
                    f"The trainer has loaded the best checkpoint, but not the ranks that it had ({error}). The layers "
                    "are not narrowed: the adapter computes as that checkpoint does.",
                    stacklevel=2,
                )
                return
        self.ranks.end()
        self._write_history(Path(args.output_dir), state)

    def _write_history(self, folder: Path, state: Any) -> None:
        if self.ranks is not None and state.is_world_process_zero and folder.is_dir():
            self.ranks.rank_history.save(folder / HISTORY_NAME)

    def state(self) -> dict[str, Any]:
        """Return the state that Trainer keeps of the callback in a checkpoint."""
        if self.ranks is None or self.ranks.is_over:
            return {"args": self._settings, "attributes": {}}
        packed = base64.b64encode(save(self.ranks.state_dict())).decode("ascii")
        return {"args": self._settings, "attributes": {"run": packed}}


def for_command(callback: AdaptRanks) -> AdaptRanks:
    """Prepare a callback for a trainer that a command runs, and return it."""
    callback._by_command = True
    return callback


def _load(ranks: AdaptiveRanks, callbacks: Any, source: str) -> None:
    saved = (callbacks or {}).get(AdaptRanks.__name__) or {}
    saved = saved[0] if isinstance(saved, list) else saved
    packed = saved.get("attributes", {}).get("run")
    if packed is None:
        raise ValueError(
            f"{source} holds no state of adaptive ranks, so the run can't continue from it. Resume without "
            "`AdaptRanks`. Or begin a new run from that adapter: load it with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`, and train without `resume_from_checkpoint`."
        )
    try:
        ranks.load_state_dict(load(base64.b64decode(packed)))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
