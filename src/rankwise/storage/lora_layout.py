"""Lays an adapter out as a plain LoRA folder: its configuration, and its tensors under PEFT's names.

AdaLoRA's default form is saved in this layout, and so are all exports.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters import AdapterLayer
from rankwise.adapters.conv import ungrouped
from rankwise.adapters.parameter import ParameterAdapters
from rankwise.attach.matching import by_ends, names_of_exactly
from rankwise.config import LoraConfig
from rankwise.storage.finite import converted
from rankwise.storage.names import PREFIX
from rankwise.storage.nesting import by_owner, named_by_targets, nested_paths

_KEPT_EXTRA = ("auto_mapping",)  # names the base model's class
_LITERAL = re.compile(r"[\w.\-]+")  # paths that match only themselves as expressions


@dataclass(frozen=True)
class Update:
    """The change ``scale * B A`` of one layer's weight.

    Args:
        A: (rank, d_in); for a grouped convolution in LoRA's layout (rank, all channels * height * width).
        B: (d_out, rank); for a grouped convolution in LoRA's layout (d_out, rank / groups).
        kind: the kind of layer, which knows the factors' names in a file. For an embedding, d_in is the number of
            entries.
        kernel: the height and width of a convolution's kernel; its d_in is channels * height * width.
        scale: the number that multiplies B A.
    """

    A: Tensor
    B: Tensor
    kind: type[AdapterLayer]
    kernel: tuple[int, ...] = ()
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.A.shape[0]

    @property
    def width(self) -> int:
        """The number of parameters that each rank has: d_in + d_out."""
        return self.A.shape[1] + self.B.shape[0]

    @property
    def parameters(self) -> int:
        """The number of parameters in A and B."""
        return self.A.numel() + self.B.numel()

    @property
    def grouped(self) -> bool:
        """Whether it belongs to a grouped convolution in LoRA's layout, where B A is not the change of the weight."""
        return self.B.shape[1] != self.rank

    def of_weight(self) -> Update | None:
        """The update as a change B A of the layer's weight; None for a grouped convolution without such a form."""
        if not self.grouped:
            return self
        try:
            return replace(self, A=ungrouped(self.A, self.rank // self.B.shape[1]))
        except ValueError:
            return None

    def cut(self, rank: int) -> Update:
        """The update with its first ``rank`` ranks only."""
        return replace(self, A=self.A[:rank], B=self.B[:, :rank])


def plain_lora(
    config: LoraConfig,
    layers: Mapping[str, Update],
    stacks: Mapping[str, Sequence[Update]],
    left_out: Collection[str] = (),
    modules: Iterable[str] | None = (),
    dtype: torch.dtype | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Build the configuration and the factors of a plain LoRA folder.

    Args:
        config: the adapter's configuration. Its settings are kept.
        layers: the update of each layer, by path, with a rank of at least 1.
        stacks: the updates of the matrices in each adapted parameter, by path, in the order in which the parameter's
            module holds its parameters. Some matrices of a parameter may have rank 0, but not all.
        left_out: the paths of layers and parameters that ``config`` adapts, but the folder does not.
        modules: see `lora_config`.
        dtype: the dtype of the factors; by default they keep their own.

    Returns:
        The configuration, and the factors by their names in the file.
    """
    whole = {path: stack_of(own) for path, own in stacks.items()}
    sizes = {path: (update.rank, update.scale) for path, update in layers.items()}
    sizes |= {path: (each.rank // len(stacks[path]), each.scale) for path, each in whole.items()}
    tensors: dict[str, Tensor] = {}
    for path, update in layers.items():
        tensors |= named_tensors(path, update, dtype)
    nested = nested_paths(whole)
    for path, update in whole.items():
        tensors |= named_tensors(nested[path], update, dtype)
    return lora_config(config, sizes, list(whole), left_out, modules), tensors


def lora_config(
    config: LoraConfig,
    layers: Mapping[str, tuple[int, float]],
    parameters: Sequence[str] = (),
    left_out: Collection[str] = (),
    modules: Iterable[str] | None = (),
) -> LoraConfig:
    """Build the configuration of LoRA layers with these ranks and scales, and with the settings of ``config``.

    Args:
        config: the adapter's configuration.
        layers: the rank and the scale of each layer, by path.
        parameters: those of ``layers`` that are parameters, in the order in which their modules hold them.
        left_out: the paths that ``config`` adapts and ``layers`` lacks.
        modules: the paths of all known modules in the base model. Names in ``target_modules`` are
            then chosen so that they match none of them except ``layers``. If None, nothing is known, and a regular
            expression names the layers.
    """
    plain = [path for path in layers if path not in set(parameters)]
    lost_parameters = {path for path in left_out if _is_parameter(path, config)}
    lost = set(left_out) - lost_parameters
    changes: dict[str, Any] = {}
    if lost:
        others = None if modules is None else (*modules, *left_out)
        changes["target_modules"] = names_of_exactly(plain, others)
        changes |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    if lost_parameters:
        changes["target_parameters"] = list(parameters)
    kept = (
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("lora_dropout", "bias", "fan_in_fan_out", "modules_to_save", "task_type"),
        *("base_model_name_or_path", "revision"),
    )
    return LoraConfig(
        **{**{name: getattr(config, name) for name in kept}, **changes},
        **ranks_and_alphas(layers),
        inference_mode=True,
        extra={name: config.extra[name] for name in _KEPT_EXTRA if name in config.extra},
    )


def ranks_and_alphas(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Choose ``r``, ``lora_alpha`` and their patterns so that every layer gets its rank and its scale.

    Args:
        layers: the rank and the scale of each layer, by path.

    Example:
        >>> found = ranks_and_alphas({"q": (4, 2.0), "k": (1, 2.0), "v": (4, 0.5)})
        >>> found["r"], found["lora_alpha"], found["rank_pattern"], found["alpha_pattern"]
        (4, 8, {'k': 1}, {'k': 2, 'v': 2})
    """
    top = max(rank for rank, _ in layers.values())
    ((scale, _),) = Counter(scale for _, scale in layers.values()).most_common(1)
    alpha = _alpha(scale, top)
    ranks = {path: rank for path, (rank, _) in layers.items() if rank != top}
    alphas = {path: _alpha(own, rank) for path, (rank, own) in layers.items()}
    alphas = {path: own for path, own in alphas.items() if own != alpha}
    return {
        "r": top,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, layers),
        "alpha_pattern": _pattern(alphas, layers),
        "use_rslora": False,
    }


def _alpha(scale: float, rank: int) -> float:
    """The ``lora_alpha`` that gives a layer of this rank this scale; an int if it is a whole number."""
    alpha = scale * rank
    whole = round(alpha)
    return whole if whole and math.isclose(alpha, whole, rel_tol=1e-14) else alpha


def _pattern(values: Mapping[str, float], paths: Iterable[str]) -> dict[str, float]:
    """Build a pattern that gives each path in ``values`` its value, and all other ``paths`` none.

    A key is a regular expression for the end of a path. If a path is also the end of another one, the keys must be
    anchored.
    """
    ends = by_ends(paths)
    if all(len(ends[path]) == 1 and _LITERAL.fullmatch(path) for path in values):
        return dict(values)
    return {f"^{re.escape(path)}$": value for path, value in values.items()}


def with_a_rank(layers: Mapping[str, list[Update]]) -> dict[str, list[Update]]:
    """Keep the layers that have ranks. If there are none, keep the first with a rank of zeros: LoRA needs one layer.

    Args:
        layers: the updates of each layer's matrices, by path.
    """
    acting = {path: matrices for path, matrices in layers.items() if any(each.rank for each in matrices)}
    if not acting:
        path, matrices = next(iter(layers.items()))
        acting[path] = [
            replace(each, A=each.A.new_zeros(1, each.A.shape[1]), B=each.B.new_zeros(len(each.B), 1))
            for each in matrices
        ]
    return acting


def named_tensors(path: str, update: Update, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Convert a layer's factors to PEFT's names and shapes.

    Raises:
        ValueError: the factors hold NaN or infinite values, or numbers that ``dtype`` can't hold.
    """
    A = converted(f"lora_A of {path!r}", update.A, dtype)
    B = converted(f"lora_B of {path!r}", update.B, dtype)
    if update.kernel:
        A, B = A.view(len(A), -1, *update.kernel), B.view(*B.shape, *[1] * len(update.kernel))
    return {
        PREFIX + update.kind.file_name(path, name, adalora=False): each.contiguous()
        for name, each in (("A", A), ("B", B))
    }


# Stacks of matrices, such as experts. In a LoRA file all matrices of a stack have the largest rank among them.


def stack_of(matrices: Sequence[Update]) -> Update:
    """Lay n matrices out as a stack in a LoRA file: A is (n * k, d_in), and B is (d_out, k * n), ordered by rank.

    Here k is the largest rank among the matrices. Matrices of lower rank are padded with zeros.
    """
    first, rank = matrices[0], max(update.rank for update in matrices)
    A = first.A.new_zeros(len(matrices), rank, first.A.shape[1])
    B = first.B.new_zeros(len(first.B), rank, len(matrices))
    for number, update in enumerate(matrices):
        A[number, : update.rank] = update.A
        B[:, : update.rank, number] = update.B
    return Update(A.flatten(0, 1), B.flatten(1), ParameterAdapters, scale=first.scale)


def in_file_order(config: LoraConfig, stacks: Iterable[str]) -> list[str]:
    """The paths of adapted parameters, sorted within each module as it holds them."""
    names_of = named_by_targets(config.target_parameters or [])
    return [
        path
        for owner, own in by_owner(stacks).items()
        for name in names_of(owner)
        if (path := f"{owner}.{name}") in own
    ]


def _is_parameter(path: str, config: LoraConfig) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in config.target_parameters or ())
