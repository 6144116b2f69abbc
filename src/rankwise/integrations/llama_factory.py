"""LLaMA-Factory: its command line, with adaptive ranks for its LoRA.

LLaMA-Factory takes callbacks only from Python. So the options go into its YAML, and this module starts it::

    rankwise:
      target_r: 4

    python -m rankwise.integrations.llama_factory train sft.yaml

Everything else is LLaMA-Factory's own: ``train`` for the stages pt, sft, rm, dpo and kto, also with several processes
(``FORCE_TORCHRUN=1``, or several GPUs), and all other commands. The options are those of `rankwise.AdaptRanks`:
``target_r``, ``tinit``, ``tfinal``, ``deltaT``.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import version
from typing import Any

from rankwise.integrations.options import check_options, check_start, moved

KEY = "rankwise"
_STAGES = ("pt", "sft", "rm", "dpo", "kto")
_TESTED = "0.9.5"
_PLACE = "`rankwise` in LLaMA-Factory's configuration"
# Settings that train without Transformers' Trainer, or without PEFT's LoRA.
_REFUSED = {
    "use_mca": "Megatron trains without Transformers' Trainer",
    "use_hyper_parallel": "HyperParallel trains without LLaMA-Factory's callbacks",
    "use_kt": "KTransformers has LoRA layers of its own",
}


def run_exp(args: dict[str, Any], callbacks: list[Any] | None = None) -> None:
    """Train as LLaMA-Factory's own ``run_exp`` does, with adaptive ranks if ``args`` has the key ``rankwise``.

    Args:
        args: LLaMA-Factory's configuration by key, with the options under ``rankwise``.
        callbacks: further callbacks for the trainer.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is unknown or out of range, or this kind of adapter cannot be adapted.
        RuntimeError: the installed version of LLaMA-Factory takes no callbacks.
    """
    tuner = _module("train.tuner", "run_exp")
    args, callbacks = dict(args), list(callbacks or ())
    if KEY in args:
        options = check_configuration(args)
        del args[KEY]
        from rankwise.integrations.adapt_ranks import AdaptRanks, for_command

        callbacks.append(for_command(AdaptRanks(**options)))
    tuner.run_exp(args, callbacks)


def check_configuration(args: dict[str, Any]) -> dict[str, Any]:
    """Read the options for `rankwise.AdaptRanks` from LLaMA-Factory's configuration.

    Args:
        args: LLaMA-Factory's configuration, by key.

    Returns:
        The options as keyword arguments.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is unknown or out of range, or this kind of adapter cannot be adapted.

    Example:
        >>> check_configuration({"stage": "sft", "lora_rank": 16, "rankwise": {"target_r": 8}})
        {'target_r': 8}
        >>> check_configuration({"stage": "sft", "pissa_init": True, "rankwise": {"target_r": 8}})
        Traceback (most recent call last):
        ...
        ValueError: `pissa_init: pissa` moves a part of the base weights into LoRA's factors, ...
    """
    kind = args.get("finetuning_type", "lora")
    if kind != "lora":
        raise ValueError(
            f"rankwise adapts the ranks of `finetuning_type: lora`, but it is {kind!r}. Set it, or take `rankwise` out."
        )
    stage = args.get("stage", "sft")
    if stage not in _STAGES:
        raise ValueError(
            f"Ranks can't adapt in `stage: {stage}`; they can in {', '.join(_STAGES)}. (PPO takes several optimizer "
            "steps for one of its trainer's, which a schedule can't follow.)"
        )
    for name, why in _REFUSED.items():
        if args.get(name) or os.environ.get(name.upper(), "").lower() in ("true", "y", "1"):
            raise ValueError(f"Ranks can't adapt with `{name}`: {why}. Leave `{name}` or `{KEY}` out.")
    if args.get("pissa_init"):
        check_start("pissa", "pissa_init")
    # An adapter that continues training keeps its rank.
    trained_on = args.get("adapter_name_or_path") and not args.get("create_new_adapter")
    rank = None if trained_on else args.get("lora_rank", 8)
    return check_options(args.get(KEY), _PLACE, rank, "lora_rank", args.get("max_steps"))


def main() -> None:
    """Run LLaMA-Factory's command line. Its ``train`` reads the key ``rankwise``."""
    if os.environ.get("USE_V1", "").lower() in ("true", "y", "1"):
        raise ValueError(
            "Ranks can't adapt with `USE_V1`, whose trainer is not Transformers': leave the variable out."
        )
    launcher = _module("launcher", "launch")
    if len(sys.argv) < 2 or sys.argv[1] != "train":
        launcher.launch()
        return
    read = _module("hparams", "read_args")
    command = sys.argv.pop(1)
    args = read.read_args()
    if not isinstance(args, dict):
        raise ValueError(
            "Give the configuration as a YAML or JSON file: `python -m rankwise.integrations.llama_factory train "
            "FILE`. Options of the kind `--name value` have no place for `rankwise`."
        )
    if KEY in args:
        check_configuration(args)  # fails before any process starts
    if "LOCAL_RANK" not in os.environ and _takes_torchrun():
        sys.argv.insert(1, command)
        # LLaMA-Factory passes its `__file__` to torchrun as the script to run.
        launcher.__file__ = f"-m {__name__ if __name__ != '__main__' else __spec__.name} train"
        launcher.launch()
        return
    run_exp(args)


def _takes_torchrun() -> bool:
    """Whether LLaMA-Factory would start several processes, by its own rule."""
    misc = _module("extras.misc", "is_env_enabled")
    several = misc.get_device_count() > 1 and not misc.use_ray() and not misc.use_kt()
    return bool(misc.is_env_enabled("FORCE_TORCHRUN") or several)


def _module(name: str, member: str) -> Any:
    """Import a module of LLaMA-Factory, which must have ``member``."""
    try:
        module = importlib.import_module(f"llamafactory.{name}")
        getattr(module, member)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ImportError) and "llamafactory" not in str(error):
            raise  # a package that LLaMA-Factory needs is missing
        what = f"`{member}` in `llamafactory.{name}`"
        raise moved("llamafactory", lambda: version("llamafactory"), what, _TESTED) from error
    return module


if __name__ == "__main__":
    main()
