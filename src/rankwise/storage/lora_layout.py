"""An adapter as a plain LoRA folder has it: its configuration, and its tensors under PEFT's names.

The default form of AdaLoRA is saved so, and all exports are written so.
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

_KEPT_EXTRA = ("auto_mapping",)  # says which class the base model has
_LITERAL = re.compile(r"[\w.\-]+")  # paths that mean themselves as expressions


@dataclass(frozen=True)
class Update:
    """The change ``scale * B A`` of one layer's weight.

    Args:
        A: (rank, d_in); for a grouped convolution in LoRA's layout (rank, all channels * height * width).
        B: (d_out, rank), or (d_out, rank / groups) for a grouped convolution in LoRA's layout.
        kind: of layer, which knows how a file names the factors. An embedding has d_in entries.
        kernel: height and width of a convolution, whose d_in is channels * height * width.
        scale: what B A is multiplied by.
    """

    A: Tensor
    B: Tensor
    kind: type[AdapterLayer]
    kernel: tuple[int, ...] = ()
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]

    @property
    def width(self) -> int:
        """Numbers that one more rank takes: d_in + d_out."""
        return self.A.shape[1] + self.B.shape[0]

    @property
    def parameters(self) -> int:
        """Numbers in A and B."""
        return self.A.numel() + self.B.numel()

    @property
    def grouped(self) -> bool:
        """Whether it is a grouped convolution's in LoRA's layout, which is no change B A of a weight."""
        return self.B.shape[1] != self.rank

    def of_weight(self) -> Update | None:
        """The same update as a change B A of the layer's weight; None if it is a grouped convolution's, and no such."""
        if not self.grouped:
            return self
        try:
            return replace(self, A=ungrouped(self.A, self.rank // self.B.shape[1]))
        except ValueError:
            return None

    def cut(self, rank: int) -> Update:
        """The first ``rank`` ranks of it."""
        return replace(self, A=self.A[:rank], B=self.B[:, :rank])


def plain_lora(
    config: LoraConfig,
    layers: Mapping[str, Update],
    stacks: Mapping[str, Sequence[Update]],
    left_out: Collection[str] = (),
    modules: Iterable[str] | None = (),
    dtype: torch.dtype | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the factors of a plain LoRA folder.

    Args:
        config: of the adapter; its settings are kept.
        layers: the update of each layer by its path, of ranks from 1.
        stacks: for each adapted parameter by its path the update of each of its matrices, of which some may have rank
            0, but not all; in the order in which the parameter's module holds it.
        left_out: paths of layers and parameters that ``config`` adapts, and the folder doesn't.
        modules: as for `lora_config`.
        dtype: of the factors; as they are if None.

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
    """The configuration of LoRA layers of these ranks and scales, with the settings of ``config``.

    Args:
        config: of the adapter.
        layers: rank and scale of each layer by its path.
        parameters: those of ``layers`` that are parameters, in the order in which their modules hold them.
        left_out: paths that ``config`` adapts beside ``layers``.
        modules: paths of the base model's modules, as far as they are known, so that names in ``target_modules`` mean
            none of them beside ``layers``. None: they are not known, and an expression names the layers.
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
    """``r``, ``lora_alpha`` and their patterns, by which every layer has its rank and its scale.

    Args:
        layers: rank and scale of each layer by its path.

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
    """``lora_alpha`` by which a layer of this rank has this scale; a whole number as such."""
    alpha = scale * rank
    whole = round(alpha)
    return whole if whole and math.isclose(alpha, whole, rel_tol=1e-14) else alpha


def _pattern(values: Mapping[str, float], paths: Iterable[str]) -> dict[str, float]:
    """A pattern that gives each of ``paths`` its value in ``values``, and the others none.

    A key is an expression for the end of a path, so a path that is the end of another one must be marked.
    """
    ends = by_ends(paths)
    if all(len(ends[path]) == 1 and _LITERAL.fullmatch(path) for path in values):
        return dict(values)
    return {f"^{re.escape(path)}$": value for path, value in values.items()}


def with_a_rank(layers: Mapping[str, list[Update]]) -> dict[str, list[Update]]:
    """The layers that have ranks; if none has, the first with a rank of 0, as a LoRA folder holds at least one.

    Args:
        layers: the updates of each layer's matrices, by its path.
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
    """A layer's factors under PEFT's names and in PEFT's shapes.

    Raises:
        ValueError: they hold NaN or infinite values, or numbers that ``dtype`` can't hold.
    """
    A = converted(f"lora_A of {path!r}", update.A, dtype)
    B = converted(f"lora_B of {path!r}", update.B, dtype)
    if update.kernel:
        A, B = A.view(len(A), -1, *update.kernel), B.view(*B.shape, *[1] * len(update.kernel))
    return {
        PREFIX + update.kind.file_name(path, name, adalora=False): each.contiguous()
        for name, each in (("A", A), ("B", B))
    }


# Stacks of matrices, such as experts: in a LoRA file all of one have the largest rank of any.


def stack_of(matrices: Sequence[Update]) -> Update:
    """A stack of n matrices as a LoRA file has it: A (n * k, d_in), and B (d_out, k * n), with rank for rank.

    Here k is the largest rank of any of the matrices: those with less are filled up with zeros.
    """
    first, rank = matrices[0], max(update.rank for update in matrices)
    A = first.A.new_zeros(len(matrices), rank, first.A.shape[1])
    B = first.B.new_zeros(len(first.B), rank, len(matrices))
    for number, update in enumerate(matrices):
        A[number, : update.rank] = update.A
        B[:, : update.rank, number] = update.B
    return Update(A.flatten(0, 1), B.flatten(1), ParameterAdapters, scale=first.scale)


def in_file_order(config: LoraConfig, stacks: Iterable[str]) -> list[str]:
    """Paths of adapted parameters, each module's in the order in which it holds them."""
    names_of = named_by_targets(config.target_parameters or [])
    return [
        path
        for owner, own in by_owner(stacks).items()
        for name in names_of(owner)
        if (path := f"{owner}.{name}") in own
    ]


def _is_parameter(path: str, config: LoraConfig) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in config.target_parameters or ())
