"""The tensors of an adapter's file by what they are for, and the layers that they make up."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.attach.matching import pattern_value, saved_module_of
from rankwise.config import CONFIG_NAME
from rankwise.report.header import TensorInfo
from rankwise.storage import PREFIX, WEIGHTS_NAME

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[ABE])(\.weight)?")
_ADDED = re.compile(r"(?P<path>.+)\.lora_(magnitude_vector(\.weight)?|[AB]\.bias)")  # DoRA; `lora_bias`
_RAW = re.compile(r".+\.lora_(embedding_)?[ABE]\.(?!weight$|bias$)[^.]+(\.weight)?")
_COPIES = re.compile(r"(.*\.)?(original_module|modules_to_save)\..+")  # PEFT's bias="all" saves heads twice


@dataclass(frozen=True)
class InspectedLayer:
    """One adapted layer.

    Args:
        path: the module's path in the base model.
        kind: ``"linear"``, ``"conv"`` or ``"embedding"``.
        rank: triplets in the file (of a file not cut down: those that the configuration keeps).
        init_r: the rank that the configuration gives it at the start.
        scale: the number that B A, or B diag(E) A, is multiplied by.
        parameters: numbers in its tensors.
    """

    path: str
    kind: str
    rank: int
    init_r: int
    scale: float
    parameters: int


@dataclass
class Tensors:
    """A file's tensors by what they are for."""

    factors: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)  # path -> {"A": ..., "B": ...}
    embeddings: set[str] = field(default_factory=set)
    added: Counter[str] = field(default_factory=Counter)  # path -> numbers beside the factors
    saved: Counter[str] = field(default_factory=Counter)  # module saved whole -> numbers
    biases: int = 0
    others: int = 0
    notes: list[str] = field(default_factory=list)


def sort_tensors(folder: Path, config: Mapping[str, Any], header: Mapping[str, TensorInfo]) -> Tensors:
    """Sort what the header names.

    Raises:
        ValueError: there are no LoRA tensors, or those of a running model.
    """
    tensors = Tensors()
    source = folder / WEIGHTS_NAME
    heads = [name for name in config.get("modules_to_save") or [] if isinstance(name, str)]
    for key, tensor in header.items():
        name = key.removeprefix(PREFIX)
        if _RAW.fullmatch(name):
            raise ValueError(
                f"{source} holds the raw state of a running model ({key!r} names an adapter inside it), not an "
                "adapter's file. Load it into that model, then call model.save_pretrained(folder)."
            )
        if match := _FACTOR.fullmatch(name):
            tensors.factors.setdefault(match["path"], {})[match["factor"]] = tensor
            if match["embedding"]:
                tensors.embeddings.add(match["path"])
        elif match := _ADDED.fullmatch(name):
            tensors.added[match["path"]] += tensor.size
        elif head := saved_module_of(name, heads, lambda path: True):
            tensors.saved[head] += 0 if _COPIES.fullmatch(name.removeprefix(f"{head}.")) else tensor.size
        elif name.endswith(".bias"):
            tensors.biases += tensor.size
        else:
            tensors.others += tensor.size
    odd = next((key for key in header if not key.startswith(PREFIX)), None)
    if odd is not None:
        tensors.notes.append(f"{odd!r} and maybe more do not begin with {PREFIX!r}: PEFT will not find them.")
    if not tensors.factors and (tensors.others or not tensors.saved):
        raise ValueError(f"{source} holds no LoRA tensors, but {_found(header)}. It is another kind of file.")
    return tensors


def _found(header: Mapping[str, TensorInfo]) -> str:
    return f"{len(header):,} others, such as {next(iter(header))!r}" if header else "nothing at all"


# Layers.


def read_layers(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> list[InspectedLayer]:
    """The adapted layers, in the file's order.

    Raises:
        ValueError: the tensors contradict each other or the configuration.
    """
    _check_kind(folder, config, tensors.factors)
    kept = _kept(folder, config)
    missing = sorted(set(kept) - set(tensors.factors))
    if missing:
        raise ValueError(
            f"{folder / CONFIG_NAME}: `rank_pattern` names {missing[0]!r}, but {WEIGHTS_NAME} has no tensors of "
            "it. The two files are not of one adapter: copy both from one place."
        )
    layers = []
    for path, factors in tensors.factors.items():
        rank = _common_rank(folder, path, factors, path in tensors.embeddings)
        if path in kept:
            rank = _kept_rank(folder, path, rank, kept[path])
        kind = (
            "embedding" if path in tensors.embeddings else "conv" if len(factors["A"].shape) > 2 else "linear"
        )
        first = _first_rank(folder, config, path, kept)
        size = sum(tensor.size for tensor in factors.values()) + tensors.added[path]
        layers.append(InspectedLayer(path, kind, rank, first, _scale(folder, config, path, first), size))
    return layers


def _check_kind(
    folder: Path, config: Mapping[str, Any], factors: Mapping[str, Mapping[str, TensorInfo]]
) -> None:
    """Each layer must have the factors of its method, and the configuration must name the right one."""
    source = folder / WEIGHTS_NAME
    with_e = sum("E" in own for own in factors.values())
    kind, right = config["peft_type"], "ADALORA" if with_e == len(factors) else "LORA"
    if factors and with_e in (0, len(factors)) and kind != right:
        has = "has lora_E tensors" if right == "ADALORA" else "has no lora_E tensors"
        raise ValueError(
            f'{folder / CONFIG_NAME}: `peft_type` is "{kind}", but {source} {has}. Set it to "{right}".'
        )
    for path, own in factors.items():
        wanted = {"A", "B", "E"} if kind == "ADALORA" else {"A", "B"}
        if set(own) != wanted:
            raise ValueError(
                f"{source} is incomplete: {path!r} has {_names(set(own))}, but {kind} takes {_names(wanted)}. "
                "Save the adapter again."
            )


def _names(factors: set[str]) -> str:
    return ", ".join(f"lora_{factor}" for factor in sorted(factors))


def _common_rank(folder: Path, path: str, factors: Mapping[str, TensorInfo], embedding: bool) -> int:
    """A is (r, ...), B is (d_out, r, ...), E is (r, 1)."""
    ranks = {}
    for name, tensor in factors.items():
        if len(tensor.shape) < 2 or (embedding and len(tensor.shape) != 2):
            raise ValueError(
                f"{folder / WEIGHTS_NAME}: lora_{name} of {path!r} has the shape {tensor.shape}, which no factor "
                "has. The file is not what it says it is: copy or save it again."
            )
        ranks[name] = tensor.shape[1 if name == "B" else 0]
    if len(set(ranks.values())) > 1:
        said = ", ".join(f"lora_{name} {factors[name].shape}" for name in sorted(factors))
        raise ValueError(
            f"{folder / WEIGHTS_NAME}: the factors of {path!r} have different ranks: {said}. Save the adapter again."
        )
    return ranks["A"]


def _kept(folder: Path, config: Mapping[str, Any]) -> dict[str, list[bool]]:
    """AdaLoRA's ``rank_pattern``, by module path."""
    pattern = config.get("rank_pattern") or {}
    if config["peft_type"] != "ADALORA":
        return {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{folder / CONFIG_NAME}: `rank_pattern` must be an object, but is {pattern!r:.60}.")
    kept = {}
    for key, flags in pattern.items():
        path, found, _ = key.removeprefix(PREFIX).rpartition(".lora_E")
        if not found or not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(
                f"{folder / CONFIG_NAME}: `rank_pattern` must have a list of true and false for each "
                f"`<module path>.lora_E`, but has {key!r}: {flags!r:.60}."
            )
        kept[path] = flags
    return kept


def _kept_rank(folder: Path, path: str, rank: int, flags: list[bool]) -> int:
    if rank not in (sum(flags), len(flags)):
        raise ValueError(
            f"{folder / CONFIG_NAME} keeps {sum(flags)} of {len(flags)} ranks of {path!r}, but {WEIGHTS_NAME} holds "
            f"{rank}. The two files are not of one adapter: copy both from one place."
        )
    return sum(flags)


def _first_rank(folder: Path, config: Mapping[str, Any], path: str, kept: Mapping[str, list[bool]]) -> int:
    if config["peft_type"] == "ADALORA":
        return len(kept[path]) if path in kept else int(config["init_r"])
    return int(_pattern(folder, config, "rank_pattern", path, config["r"]))


def _pattern(folder: Path, config: Mapping[str, Any], name: str, path: str, default: Any) -> Any:
    patterns = config.get(name) or {}
    try:
        value = pattern_value(patterns, path, default)
    except (AttributeError, TypeError, re.error) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: `{name}` is broken ({error}).") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"{folder / CONFIG_NAME}: `{name}` must hold numbers, but has {value!r:.40} for {path!r}."
        )
    return value


def _scale(folder: Path, config: Mapping[str, Any], path: str, rank: int) -> float:
    """What the update B A is multiplied by; PEFT's AdaLoRA knows neither ``alpha_pattern`` nor ``use_rslora``."""
    if config["peft_type"] == "ADALORA" and config.get("init_lora_weights") == "gated":  # with its open gates
        target = config["target_r"]
        return float(config["lora_alpha"] / (math.sqrt(target) if config.get("use_rslora") else target))
    if config["peft_type"] == "ADALORA":
        return float(config["lora_alpha"] / (config["init_r"] + 1e-5))
    alpha = _pattern(folder, config, "alpha_pattern", path, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)) if rank else 0.0
