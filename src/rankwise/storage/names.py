"""Names of the files in an adapter folder, and of what is in them."""

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
NO_SCHEDULE = (
    1  # total_step in a file whose run had no length yet; of a run of one step nothing is left to go on
)
EXTRA_STATE = "_extra_state"  # PyTorch's key for what `get_extra_state` gives


def checkpoint_step(folder: Path) -> int | None:
    """The step in the name that Transformers and others give to a folder to go on from; None for other names.

    Example:
        >>> checkpoint_step(Path("out/checkpoint-500")), checkpoint_step(Path("out"))
        (500, None)
    """
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(named[1]) if named else None
