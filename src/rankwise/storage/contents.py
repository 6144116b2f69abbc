"""Sorts the tensors of an adapter's file by purpose, which their names and shapes tell.

This works on a file's header, in which tensors have no values, and on loaded tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from rankwise.adapters import KINDS, AdapterLayer, factor_name
from rankwise.config import CONFIG_NAME
from rankwise.parallel.wrappers import without
from rankwise.storage.names import PREFIX

_RAW = re.compile(r".+\.lora_(embedding_)?[ABE]\.(?!weight$|bias$)[^.]+(\.weight)?")


class Shaped(Protocol):
    """A tensor, or its entry in a file's header."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the dimensions."""


T = TypeVar("T", bound=Shaped)


@dataclass
class Contents(Generic[T]):
    """The tensors of a file by purpose.

    Args:
        factors: the factors of each layer, by path, as ``{"A": …, "B": …, "E": …}``.
        others: biases, modules saved in full and all other tensors, by name.
        kinds: the kind of each layer, by path, as the names of its factors tell it.
    """

    factors: dict[str, dict[str, T]] = field(default_factory=dict)
    others: dict[str, T] = field(default_factory=dict)
    kinds: dict[str, type[AdapterLayer]] = field(default_factory=dict)


def sort_by_use(source: str, tensors: Mapping[str, T]) -> Contents[T]:
    """Sort tensors with PEFT's names; ``source`` names their origin in messages.

    Raises:
        ValueError: the tensors are the state of a running model, or a factor occurs twice.
    """
    contents: Contents[T] = Contents()
    for key, tensor in tensors.items():
        name = without(key.removeprefix(PREFIX))  # PEFT keeps the names that `torch.compile` inserts
        found = factor_name(name)
        if found is None and _RAW.fullmatch(name):
            raise ValueError(
                f"{source} holds the raw state of a running model ({key!r} names an adapter inside it), not an "
                "adapter's file. Load it into that model, then call model.save_pretrained(folder)."
            )
        if found is None:
            contents.others[name] = tensor
            continue
        own = contents.factors.setdefault(found.path, {})
        if found.factor in own:
            raise ValueError(f"{source} holds lora_{found.factor} of {found.path!r} twice.")
        own[found.factor] = tensor
        if found.factor != "E":  # the name of E is the same for every kind
            contents.kinds[found.path] = found.kind
    return contents


def named_by_use(tensors: Mapping[str, T]) -> dict[str, T]:
    """Name the base weights and biases of layers that have no factors in a file as those of plain modules.

    Inside an adapted layer PEFT looks for ``path.base_layer.bias``, and elsewhere for ``path.bias``. It ignores other
    names.

    Args:
        tensors: all tensors of a file, by PEFT's names.

    Example:
        >>> sorted(named_by_use({"q.lora_A.weight": 1, "q.base_layer.bias": 2, "k.base_layer.bias": 3}))
        ['k.bias', 'q.base_layer.bias', 'q.lora_A.weight']
    """
    adapted = {found.path for name in tensors if (found := factor_name(name)) is not None}
    renamed: dict[str, T] = {}
    for name, tensor in tensors.items():
        path, inner, parameter = name.rpartition(".base_layer.")
        plain = inner and factor_name(name) is None and path not in adapted
        renamed[f"{path}.{parameter}" if plain else name] = tensor
    return renamed


def check_complete(source: str, config: str, peft_type: str, factors: Mapping[str, Mapping[str, T]]) -> None:
    """Check that each layer has all factors of the method that the file ``config`` names.

    Raises:
        ValueError: a layer lacks a factor or has one too many.
    """
    wanted = {"A", "B", "E"} if peft_type == "ADALORA" else {"A", "B"}
    with_e = sum("E" in own for own in factors.values())
    right = "ADALORA" if with_e == len(factors) else "LORA"
    if factors and with_e in (0, len(factors)) and peft_type != right:
        raise ValueError(
            f'{config}: `peft_type` is "{peft_type}", but {source} has {"" if with_e else "no "}lora_E tensors; '
            f'{peft_type} takes {_names(wanted)}. Set it to "{right}".'
        )
    for path, own in factors.items():
        if set(own) != wanted:
            raise ValueError(
                f"{source} is incomplete or mislabelled in {CONFIG_NAME}: {path!r} has {_names(own)}, but "
                f"{peft_type} takes {_names(wanted)}. Save the adapter again."
            )


def common_rank(source: str, path: str, factors: Mapping[str, T], kind: type[AdapterLayer]) -> int:
    """The rank that a layer's factors share: A is (r, ...), B is (d_out, r, ...), E is (r, 1).

    Args:
        source: the file's name, for messages.
        path: the layer's path.
        factors: the layer's factors.
        kind: the layer's kind, by the names of its factors.

    Raises:
        ValueError: a factor has an impossible shape, or the factors' ranks differ.
    """
    alike = (each for each in KINDS if each.file_prefix == kind.file_prefix)
    matrices = "E" in factors or all(each.file_dims == 2 for each in alike)
    for name, tensor in factors.items():
        if len(tensor.shape) < 2 or (matrices and len(tensor.shape) != 2):
            raise ValueError(
                f"{source}: lora_{name} of {path!r} should be a matrix, but has the shape {tuple(tensor.shape)}, "
                "which no factor has."
            )
    rank, columns = factors["A"].shape[0], factors["B"].shape[1]
    # a convolution's B has r / groups columns
    grouped = "E" not in factors and columns > 0 and rank % columns == 0
    if (columns != rank and not grouped) or ("E" in factors and factors["E"].shape[0] != rank):
        said = ", ".join(f"lora_{name} {tuple(factors[name].shape)}" for name in sorted(factors))
        raise ValueError(
            f"{source}: the factors of {path!r} should have one rank, but have different ranks: {said}. Save the "
            "adapter again."
        )
    return rank


def check_pattern_names(source: str, pattern: Iterable[str], factors: Mapping[str, Mapping[str, T]]) -> None:
    """Check that a file has tensors for all layers that ``rank_pattern`` names.

    Raises:
        ValueError: a layer has no tensors.
    """
    missing = sorted(set(pattern) - set(factors))
    if missing:
        raise ValueError(
            f"{CONFIG_NAME}: `rank_pattern` names {missing[0]!r}, of which {source} has no tensors. The two files "
            "belong to different adapters: copy both from one place."
        )


def _names(factors: Iterable[str]) -> str:
    return ", ".join(f"lora_{factor}" for factor in sorted(factors))
