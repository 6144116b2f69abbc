"""axolotl: a plugin that adapts the ranks of axolotl's LoRA and QLoRA.

In axolotl's YAML::

    plugins:
      - rankwise.integrations.axolotl.AdaptiveRanks
    rankwise:
      target_r: 8

The options under ``rankwise:`` are those of `rankwise.AdaptRanks`: ``target_r``, ``tinit``, ``tfinal``, ``deltaT``.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rankwise.integrations.options import check_options, check_start, lacking, moved

_TESTED = "0.19.0"
_PLACE = "`rankwise` in axolotl's configuration"
_HOOKS = ("get_input_args", "add_callbacks_pre_trainer", "post_trainer_create")

if TYPE_CHECKING:
    _Plugin: Any = object
else:
    try:
        from axolotl.integrations.base import BasePlugin as _Plugin
    except ImportError:  # the plugin raises an error when axolotl makes it
        _Plugin = object


class AdaptiveRanks(_Plugin):
    """axolotl's plugin. It adds the callback `rankwise.AdaptRanks` to every trainer, of SFT and of RL.

    axolotl makes it from its name in ``plugins``.

    Raises:
        RuntimeError: the installed version of axolotl has other hooks.
    """

    def __init__(self) -> None:
        missing = "integrations.base.BasePlugin" if _Plugin is object else lacking(_Plugin, _HOOKS)
        if missing is not None:
            raise moved("axolotl", lambda: version("axolotl"), f"`{missing}`", _TESTED)
        super().__init__()

    def get_input_args(self) -> str:
        """Return the place where axolotl finds the schema of the options."""
        return "rankwise.integrations.axolotl_options.RankwiseArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Return the callback for the trainer that is about to be made."""
        from rankwise.integrations.adapt_ranks import AdaptRanks, for_command

        return [for_command(AdaptRanks(**check_configuration(dict(cfg))))]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Check that the trainer has the callback.

        Raises:
            RuntimeError: the callback is missing, so the trainer would train plain LoRA.
        """
        from rankwise.integrations.adapt_ranks import AdaptRanks

        callbacks = trainer.callback_handler.callbacks
        if not any(isinstance(callback, AdaptRanks) for callback in callbacks):
            what = f"callbacks of plugins in its {type(trainer).__name__}"
            raise moved("axolotl", lambda: version("axolotl"), what, _TESTED)


def check_configuration(cfg: dict[str, Any]) -> dict[str, Any]:
    """Read the options for `rankwise.AdaptRanks` from axolotl's configuration.

    Args:
        cfg: axolotl's configuration, by key.

    Returns:
        The options as keyword arguments.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is unknown or out of range, or this kind of adapter cannot be adapted.

    Example:
        >>> check_configuration({"adapter": "lora", "lora_r": 16, "rankwise": {"target_r": 8}})
        {'target_r': 8}
        >>> check_configuration({"adapter": "lora", "lora_r": 4, "rankwise": {"target_r": 8}})
        Traceback (most recent call last):
        ...
        ValueError: ...`target_r`=8 is greater than `lora_r`=4...
    """
    adapter = cfg.get("adapter")
    if adapter not in ("lora", "qlora"):
        raise ValueError(
            f"rankwise's plugin adapts the ranks of `adapter: lora` and `adapter: qlora`, but `adapter` is "
            f"{adapter!r}. Set it, or take the plugin out of `plugins`."
        )
    if cfg.get("relora"):
        raise ValueError(
            "`relora` merges LoRA and starts it again, so its ranks can't adapt: leave `relora` out."
        )
    check_start(cfg.get("peft_init_lora_weights"), "peft_init_lora_weights")
    if ((cfg.get("peft") or {}).get("loftq_config") or {}).get("loftq_bits"):
        check_start("loftq", "peft.loftq_config")
    # A loaded adapter keeps its rank, and patterns give layers other ranks.
    own_rank = cfg.get("lora_model_dir") or cfg.get("lora_rank_pattern")
    rank = None if own_rank else cfg.get("lora_r")
    return check_options(cfg.get("rankwise"), _PLACE, rank, "lora_r", cfg.get("max_steps"))
