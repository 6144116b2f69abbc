"""ms-swift: a callback that adapts the ranks of ms-swift's LoRA.

In a plugin file of your own, such as ``ranks.py``::

    from rankwise.integrations.ms_swift import adapt_ranks

    adapt_ranks(target_r=4)

and in ms-swift's YAML (or as ``--external_plugins ranks.py --callbacks rankwise``)::

    external_plugins: ranks.py
    callbacks: rankwise
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import FrameType
from typing import Any

from rankwise.integrations import adapt_ranks as callback
from rankwise.integrations.options import check_options, check_start, moved

NAME = "rankwise"
_TESTED = "4.6.0"
_PLACE = "`adapt_ranks` in the plugin of ms-swift"


class AdaptRanks(callback.AdaptRanks):
    """`rankwise.AdaptRanks` for ms-swift, which saves no adapter after the last step.

    When training ends, the adapter is saved in the run's folder, next to the checkpoints.
    """

    _trainer: Any = None

    @classmethod
    def for_trainer(cls, trainer: Any, **settings: Any) -> AdaptRanks:
        """Make the callback for one of ms-swift's trainers."""
        made = cls(**settings)
        made._trainer = trainer
        callback.for_command(made)
        return made

    def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Narrow the layers to the ranks that are left, and save the adapter."""
        super().on_train_end(args, state, control, **unused)
        if self._trainer is not None and self.ranks is not None:
            self._trainer.save_model(args.output_dir)


def adapt_ranks(
    target_r: float | None = None,
    *,
    tinit: int | float | None = None,
    tfinal: int | float | None = None,
    deltaT: int | None = None,
    **unknown: Any,
) -> None:
    """Adapt the ranks of ms-swift's LoRA. Call it in a file that ``external_plugins`` names.

    It registers the callback ``rankwise``, which ``callbacks`` must name.

    Args:
        target_r: average rank at the end, greater than 0 and at most ``lora_rank``. None: half of it.
        tinit: length of the warm-up, in optimizer steps (int) or as a fraction of the run (float in [0, 1)). None: 2 %
            of the run.
        tfinal: length of the final phase, in which no rank changes, in optimizer steps (int) or as a fraction of the
            run (float in [0, 1)). None: 60 % of the run.
        deltaT: optimizer steps between two cuts, at least 1. None: the number that gives twenty cuts.
        unknown: misspelt options. The error names them.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is unknown or out of range, ``callbacks`` does not name ``rankwise``, or this kind of
            adapter cannot be adapted.
        RuntimeError: the installed version of ms-swift registers callbacks elsewhere.
    """
    try:
        from swift.callbacks import callbacks_map
    except ImportError as error:
        if "swift" not in str(error):
            raise  # a package that ms-swift needs is missing
        raise moved(
            "ms-swift", lambda: version("ms-swift"), "`swift.callbacks.callbacks_map`", _TESTED
        ) from error
    options = {"target_r": target_r, "tinit": tinit, "tfinal": tfinal, "deltaT": deltaT, **unknown}
    arguments = _being_read()
    settings = check_options(options, _PLACE, None, "lora_rank")
    if arguments is not None and hasattr(arguments, "callbacks"):  # the command trains
        settings = check_configuration(arguments, options)

    def made(args: Any, trainer: Any) -> AdaptRanks:
        check_configuration(args, options)
        return AdaptRanks.for_trainer(trainer, **settings)

    callbacks_map[NAME] = made


def check_configuration(args: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Check the options for `rankwise.AdaptRanks` against ms-swift's arguments.

    Args:
        args: ms-swift's arguments of a training command.
        options: options that `adapt_ranks` was given.

    Returns:
        The options as keyword arguments.

    Raises:
        TypeError: as `adapt_ranks`.
        ValueError: as `adapt_ranks`.

    Example:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(tuner_type="lora", lora_rank=8, callbacks=["rankwise"], max_steps=100)
        >>> check_configuration(args, {"target_r": 4})
        {'target_r': 4}
        >>> check_configuration(SimpleNamespace(tuner_type="longlora", callbacks=["rankwise"]), {})
        Traceback (most recent call last):
        ...
        ValueError: rankwise adapts the ranks of `tuner_type: lora`, but it is 'longlora'. Set it, or take ...
    """
    named = getattr(args, "callbacks", None) or []
    if NAME not in ([named] if isinstance(named, str) else named):
        raise ValueError(
            f"The plugin for adaptive ranks is loaded, but `callbacks` does not name it, so this run would train plain "
            f"LoRA. Add `callbacks: {NAME}` (`--callbacks {NAME}`), or leave the plugin out."
        )
    kind = getattr(args, "tuner_type", "lora")
    if kind != "lora":
        raise ValueError(
            f"rankwise adapts the ranks of `tuner_type: lora`, but it is {kind!r}. Set it, or take the plugin out."
        )
    if getattr(args, "use_swift_lora", False):
        raise ValueError(
            "`use_swift_lora` has LoRA layers of ms-swift's own: leave it out to let ranks adapt."
        )
    if getattr(args, "rlhf_type", None) == "ppo":
        raise ValueError(
            "Ranks can't adapt in `rlhf_type: ppo`, which takes several optimizer steps for one of its trainer's."
        )
    check_start(getattr(args, "init_weights", None), "init_weights")
    rank = None if getattr(args, "adapters", None) else getattr(args, "lora_rank", None)
    return check_options(options, _PLACE, rank, "lora_rank", getattr(args, "max_steps", None))


def _being_read() -> Any:
    """The arguments that ms-swift is reading while it imports the plugin. None if it reads none.

    ms-swift imports plugins while it checks its arguments, and does not pass the arguments on.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if hasattr(found, "external_plugins") and hasattr(found, "tuner_type"):
            return found
        frame = frame.f_back
    return None
