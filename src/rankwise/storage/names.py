"""Names of the files in an adapter folder, and of their entries."""

from __future__ import annotations

import re
from pathlib import Path

from rankwise.config import CONFIG_NAME

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
HISTORY_NAME = "rank_history.json"
TRAINING_STATE_NAME = "training_state.safetensors"
TRAINING_CONFIG_NAME = "training_config.json"
OWNED = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, HISTORY_NAME, TRAINING_STATE_NAME, TRAINING_CONFIG_NAME)
PREFIX = "base_model.model."
NO_SCHEDULE = 1  # total_step in the file of a run of unknown length; a run of one step has nothing to resume
EXTRA_STATE = "_extra_state"  # PyTorch's key for the result of `get_extra_state`


def checkpoint_step(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, as Transformers and others write it; None for other names.

    Example:
        >>> checkpoint_step(Path("out/checkpoint-500")), checkpoint_step(Path("out"))
        (500, None)
    """
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(named[1]) if named else None
