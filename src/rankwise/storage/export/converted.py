"""Finds a model's parameters in files that store them under other names or in pieces.

Transformers renames weights when it loads them, and joins the experts of a mixture. For example, Mixtral's files have
``block_sparse_moe.experts.3.w1.weight``, but the model has one ``mlp.experts.gate_up_proj`` for all experts.
Transformers' own table of conversions describes this. It is read for a model of the folder's class without weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.attach.embeddings import output_embeddings
from rankwise.storage.export.exported import IN_PYTHON
from rankwise.storage.export.places import Place, same_weight


@dataclass(frozen=True)
class Piece:
    """A matrix in a file that holds some rows of a matrix of the model, beginning with row ``first``."""

    place: Place
    first: int


class Converted:
    """The parameters of the model in a folder, as Transformers loads it.

    Args:
        folder: the model's folder.
        places: the places of the tensors in its files, by name.

    Raises:
        ValueError: Transformers is not installed, is too old, or does not know the model.
    """

    def __init__(self, folder: Path, places: Mapping[str, Place]) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, rename_source_key
        except ImportError as error:
            raise ValueError(
                f"{folder} holds weights under names that only Transformers from 5.0 knows. Install it: "
                f'`pip install "rankwise[train]"` ({error}).'
            ) from None
        self._folder, self._model = folder, _without_weights(folder)
        self._state = self._model.state_dict()
        transforms = get_model_conversion_mapping(self._model)
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
        self._converters = {source: each for each in converters for source in each.source_patterns}
        self._sources: dict[str, dict[str | None, list[Place]]] = defaultdict(lambda: defaultdict(list))
        for name, place in places.items():
            parameter, pattern = rename_source_key(
                name, renamings, converters, self._model.base_model_prefix, self._state
            )
            self._sources[parameter][pattern].append(place)

    def renamed(self, name: str) -> Place | None:
        """The tensor in the files that becomes the parameter ``name``, under any name. None: no single tensor does."""
        found = same_weight(self._sources, name)
        sources = self._sources[found] if found is not None else {}
        (place,) = sources[None] if sources.keys() == {None} and len(sources[None]) == 1 else (None,)
        return place

    def sharing(self, name: str) -> list[str]:
        """The other parameters of the model that share this one's weight.

        These are the parameters that the model ties when it is built, and those of the same shape that the files lack:
        on loading, Transformers gives them another parameter's weight, whatever the configuration says.
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        found = same_weight(parameters, name)
        if found is None:
            return []
        absent = (
            [other for other in parameters if not self._sources.get(other)]
            if self._sources.get(found)
            else []
        )
        return [
            other
            for other, each in parameters.items()
            if other != found
            and (each is parameters[found] or (other in absent and each.shape == parameters[found].shape))
        ]

    def output_weight(self) -> str | None:
        """The name of the output layer's weight, if the model has an output layer."""
        weight = getattr(next(output_embeddings(self._model), None), "weight", None)
        parameters = self._model.named_parameters(remove_duplicate=False)
        names = [name for name, each in parameters if each is weight]
        return names[-1] if names else None

    def is_transposed(self, name: str) -> bool:
        """Whether the matrices of a stack are (d_in, d_out)."""
        parameter = self._parameter(name)
        owner = self._model.get_submodule(parameter.rpartition(".")[0])
        return self._state[parameter].dim() == 3 and bool(getattr(owner, "is_transposed", False))

    def in_order(self, names: Sequence[str]) -> bool:
        """Whether the module that holds these parameters holds them in this order."""
        places = list(self._state)
        found = [places.index(self._parameter(name)) for name in names]
        return found == sorted(found)

    def pieces(self, name: str, number: int) -> list[Piece]:
        """The pieces of a matrix of the parameter ``name`` in the files.

        Raises:
            ValueError: the model has no such parameter, or its files store it in an unknown form.
        """
        parameter = self._parameter(name)
        sources, shape = self._sources[parameter], self._state[parameter].shape
        if sources.keys() == {None} and len(sources[None]) == 1 and sources[None][0].shape == shape:
            return [Piece(sources[None][0].matrix(number), 0)]
        if None in sources or not sources:
            raise self._unknown(name)
        converter = self._converters[next(iter(sources))]
        if not stacks_and_joins(converter.operations) or len(sources) != len(converter.source_patterns):
            raise self._unknown(name)
        pieces, first = [], 0
        for pattern in converter.source_patterns:  # in the order in which they are joined
            own = sorted(sources[pattern], key=_by_number)
            if len(own) != len(self._state[parameter]) or own[number].flat[1] != shape[2]:
                raise self._unknown(name)
            pieces.append(Piece(own[number], first))
            first += own[number].shape[0]
        if first != shape[1]:
            raise self._unknown(name)
        return pieces

    def _parameter(self, name: str) -> str:
        found = same_weight(self._state, name)
        if found is None:
            raise ValueError(
                f"The adapter changes {name!r}, which the {type(self._model).__name__} in {self._folder} does not "
                "have: it is another model's."
            )
        return found

    def _unknown(self, name: str) -> ValueError:
        return ValueError(
            f"{self._folder} holds {name!r} in a form that merging in files does not know. {IN_PYTHON}"
        )


def _without_weights(folder: Path) -> Any:
    """Build the model on the meta device, where it takes no memory. Code that comes with a model is not run."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        named = next(iter(config.architectures or ()), "AutoModel")
        kind = getattr(transformers, named)
        with torch.device("meta"):
            return kind.from_config(config) if named == "AutoModel" else kind(config)
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"Transformers can't say where {folder} holds the model's weights: {error} {IN_PYTHON}"
        ) from None


def stacks_and_joins(operations: list[Any]) -> bool:
    """Whether a converter only stacks matrices, and perhaps joins the rows of several kinds."""
    known = [("MergeModulelist", 0), ("Concatenate", 1)]
    found = [(type(each).__name__, getattr(each, "dim", None)) for each in operations]
    return bool(found) and found == known[: len(found)]


def _by_number(place: Place) -> list[int]:
    """A sort key that puts expert 2 before expert 10, for names that differ only in numbers."""
    return [int(part) for part in place.name.split(".") if part.isdigit()]
