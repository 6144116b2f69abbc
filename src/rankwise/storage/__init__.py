"""Adapter folders in PEFT's format, with the additional files that resuming needs.

    adapter_config.json            the configuration, in PEFT's spelling
    adapter_model.safetensors      the factors, cut to the ranks that stay
    rank_history.json              budget and ranks over the run (AdaLoRA)
    training_state.safetensors     uncut factors, statistics, masks and step of an unfinished run; not for sharing
    training_config.json           the run's configuration (AdaLoRA in the default form, which saves plain LoRA)

Loading a folder runs no code from it: tensors are read by safetensors, or from ``adapter_model.bin`` with
``weights_only=True``. No file outside the folder is opened. Shapes are compared with the model before any tensor is
read from the disk, and everything is checked before the model changes.
"""

from __future__ import annotations

from rankwise.storage.adapter_file import AdapterFile
from rankwise.storage.embeddings import embedding_keys
from rankwise.storage.names import (
    EXTRA_STATE,
    HISTORY_NAME,
    OWNED,
    PICKLE_NAME,
    PREFIX,
    TRAINING_CONFIG_NAME,
    TRAINING_STATE_NAME,
    WEIGHTS_NAME,
    checkpoint_step,
)
from rankwise.storage.older_names import take_present_names
from rankwise.storage.read import AdapterHeader, read_adapter, read_header
from rankwise.storage.states import file_tensors, load_file_tensors
from rankwise.storage.training import plan_from_training_state, prepare_training_state, trains_more
from rankwise.storage.values import plan_from_file, prepare_values
from rankwise.storage.write import gathered_state, read_model_adapter, write_adapter

__all__ = [
    "EXTRA_STATE",
    "HISTORY_NAME",
    "OWNED",
    "PICKLE_NAME",
    "PREFIX",
    "TRAINING_CONFIG_NAME",
    "TRAINING_STATE_NAME",
    "WEIGHTS_NAME",
    "AdapterFile",
    "AdapterHeader",
    "checkpoint_step",
    "embedding_keys",
    "file_tensors",
    "gathered_state",
    "load_file_tensors",
    "plan_from_file",
    "plan_from_training_state",
    "prepare_training_state",
    "prepare_values",
    "read_adapter",
    "read_header",
    "read_model_adapter",
    "take_present_names",
    "trains_more",
    "write_adapter",
]
