"""The configuration of a run whose adapter is saved as plain LoRA: ``training_config.json`` in the adapter's folder.

It tells how the adapter was trained, and how to continue the run if its state was saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rankwise.config import AdaLoraConfig
from rankwise.files.atomic import write_file
from rankwise.files.json_file import read_json
from rankwise.files.tensors import checksum, stored_checksum
from rankwise.storage.names import TRAINING_CONFIG_NAME, TRAINING_STATE_NAME, WEIGHTS_NAME


def write_run_config(
    path: Path, config: AdaLoraConfig, adapter: Mapping[str, Tensor], state: Mapping[str, Tensor] | None
) -> None:
    """Write a run's configuration, with checksums of the adapter's tensors and of the run's state, if it is saved."""
    content = {
        "config": config.to_dict(),
        "adapter": checksum(adapter),
        "state": None if state is None else checksum(state),
    }
    write_file(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_run_config(folder: Path, adapter: Mapping[str, Tensor]) -> AdaLoraConfig:
    """Read a run's configuration, and check that it was saved together with the adapter and the run's state.

    Args:
        folder: a folder that holds the state of a run.
        adapter: the tensors of the adapter's file.

    Raises:
        TypeError, ValueError: the file is broken or of another kind, or the three were not saved together.
    """
    path = folder / TRAINING_CONFIG_NAME
    content = read_json(path)
    if not isinstance(content, dict) or not {"config", "adapter", "state"} <= content.keys():
        raise ValueError(
            f'{path} must hold a JSON object with "config", "adapter" and "state". Use another checkpoint.'
        )
    config = AdaLoraConfig.from_dict(content["config"], source=str(path))
    if config.form.has_E:
        raise ValueError(
            f"{path} belongs to a run with `init_lora_weights`={config.init_lora_weights!r}, whose adapter is not "
            "saved as plain LoRA. It is another run's: copy all files from one place."
        )
    # A state that somebody changed on purpose has no checksum of its own.
    state = stored_checksum(folder / TRAINING_STATE_NAME) or content["state"] or "none"
    for key, found, name in (
        ("adapter", checksum(adapter), WEIGHTS_NAME),
        ("state", state, TRAINING_STATE_NAME),
    ):
        if content[key] != found:
            raise ValueError(
                f"{path} and {name} differ: they were not saved together. Use another checkpoint; or remove "
                f"{TRAINING_STATE_NAME} and {TRAINING_CONFIG_NAME}, and the adapter's values are taken without the run."
            )
    return config
