"""Decides which of the base model's embeddings an adapter's file must hold to be complete."""

from __future__ import annotations

import warnings

from torch import nn

from rankwise.adapters import AdapterLayer
from rankwise.attach.attachment import plain_name, saved_modules
from rankwise.attach.embeddings import input_embeddings, output_embeddings, resized_vocabulary
from rankwise.attach.matching import within
from rankwise.attach.targets import own_modules


def embedding_keys(model: nn.Module, adapter: str, save: bool | str) -> dict[str, str]:
    """The parameters of input and output embeddings that belong in an adapter's file, with their names there.

    Modules in ``modules_to_save`` are left out: the file has the adapter's own copies of these.

    Args:
        model: the adapted model. A model that does not declare its embeddings gives no parameters.
        adapter: the name of one of its adapters.
        save: True for all embeddings, False for none. "auto" selects the adapted ones, or all if the vocabulary's
            size differs from that in the base's checkpoint.

    Raises:
        ValueError: ``save`` has another value.

    Warns:
        UserWarning: "auto" has found a vocabulary that was resized.
    """
    if save not in (True, False, "auto"):
        raise ValueError(f"`save_embedding_layers` must be True, False or 'auto', but is {save!r}.")
    if save is False:
        return {}
    # An adapted input layer for pictures or sound is not a vocabulary: its weight stays in the base model alone.
    inputs, outputs = list(input_embeddings(model)), list(output_embeddings(model))
    sizes = resized_vocabulary(model) if save == "auto" else None
    if sizes is not None:
        warnings.warn(
            f"The model's vocabulary has {sizes[1]} tokens, but the base model's checkpoint {sizes[0]}: the embeddings "
            "are saved with the adapter. Whoever loads it must call `model.resize_token_embeddings"
            f"({sizes[1]})` on the base first. To save the adapter alone, pass `save_embedding_layers=False`.",
            UserWarning,
            stacklevel=4,
        )
    everything = save is True or sizes is not None
    copied = [path for path, module in saved_modules(model).items() if adapter in module.modules_to_save]
    keys: dict[str, str] = {}
    for path, module in own_modules(model).items():
        meant = any(module is each for each in outputs)
        meant |= any(module is each for each in inputs) and (everything or isinstance(module, nn.Embedding))
        if not meant or within(plain_name(path), copied):
            continue
        adapted = isinstance(module, AdapterLayer) and adapter in module.lora_A
        if adapted or everything:
            for name, _ in module.named_parameters(recurse=False):
                inner = f"base_layer.{name}" if adapted else name
                keys[plain_name(f"{path}.{name}")] = plain_name(f"{path}.{inner}")
    return keys
