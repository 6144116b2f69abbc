"""An adapter's tensors by their names in its file, without writing a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rankwise.attach.attachment import plain_state
from rankwise.run.controller import Controller
from rankwise.storage.adapter_file import sort_tensors
from rankwise.storage.embeddings import embedding_keys
from rankwise.storage.names import PREFIX
from rankwise.storage.read import check_factors
from rankwise.storage.values import prepare_values
from rankwise.storage.write import adapter_content, portable


def file_tensors(
    model: Any,
    adapter: str,
    controller: Controller | None,
    state: Mapping[str, Any] | None,
    save_embedding_layers: bool | str,
) -> dict[str, Tensor]:
    """The tensors that `write_adapter` would write. ``state`` is the model's state dictionary; None for the current."""
    state = plain_state(model.state_dict() if state is None else state)
    _, tensors = adapter_content(model, adapter, model.peft_config[adapter], controller, state)
    more = embedding_keys(model, adapter, save_embedding_layers)
    return tensors | {PREFIX + name: portable(state[key]) for key, name in more.items()}


def load_file_tensors(
    model: Any, adapter: str, controller: Controller | None, tensors: Mapping[str, Tensor]
) -> None:
    """Load the result of `file_tensors` into an attached adapter. A run continues with its own ranks.

    Raises:
        ValueError: the values belong to another adapter, or to other ranks. Nothing changes then.
    """
    state = plain_state(model.state_dict())
    config, _ = adapter_content(model, adapter, model.peft_config[adapter], controller, state)
    file = sort_tensors("The state dictionary", config, tensors)
    check_factors(file)
    if controller is not None:
        file.history = controller.history  # it names the layers at rank 0, which have no tensors
    prepare_values(model, adapter, file, controller, takes_choice=False)()
