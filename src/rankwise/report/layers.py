"""The layers of an adapter, read from its file header, its configuration and its gates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.adapters import factor_name
from rankwise.attach.matching import pattern_value
from rankwise.config import CONFIG_NAME
from rankwise.files.tensors import read_tensors
from rankwise.method.scale import adalora_scale, lora_scale
from rankwise.run.history import RankHistory
from rankwise.run.pairs import block_names
from rankwise.storage import PREFIX, WEIGHTS_NAME, AdapterHeader
from rankwise.storage.contents import check_pattern_names
from rankwise.storage.nesting import named_by_targets, unnested_paths


@dataclass(frozen=True)
class InspectedLayer:
    """One adapted layer.

    Args:
        path: the module's path in the base model.
        kind: ``"linear"``, ``"conv"``, ``"embedding"``, or ``"parameter"`` for one matrix of a stack (an expert).
        rank: the number of ranks in the file. If the file still holds ranks that were cut, only those that the
            configuration keeps are counted.
        init_r: the layer's rank at the start, from the configuration.
        scale: the number that B A, or B diag(E) A, is multiplied by.
        parameters: the number of parameters in the layer's tensors.
    """

    path: str
    kind: str
    rank: int
    init_r: int
    scale: float
    parameters: int


def read_layers(folder: Path, header: AdapterHeader, added: Mapping[str, int]) -> list[InspectedLayer]:
    """List the adapted layers, in the file's order.

    Args:
        folder: the adapter's folder.
        header: the configuration and the file header in that folder.
        added: for each layer's path, the number of parameters that it has in addition to its factors.

    Raises:
        ValueError: the tensors contradict the configuration.
    """
    config, contents = header.config, header.contents
    kept = _kept(folder, config)
    check_pattern_names(str(folder / WEIGHTS_NAME), kept, contents.factors)
    gates = _gates(folder, header)
    layers = []
    targets = [name for name in config.get("target_parameters") or () if isinstance(name, str)]
    parameters = unnested_paths(contents.factors, named_by_targets(targets)) if targets else {}
    for path, factors in contents.factors.items():
        rank = (
            _kept_rank(folder, path, header.ranks[path], kept[path]) if path in kept else header.ranks[path]
        )
        kind = "conv" if len(factors["A"].shape) > 2 else contents.kinds[path].called.lower()
        named = parameters.get(path, path)
        first = _first_rank(folder, config, named, kept)
        scale = _scale(folder, config, named, first, gates.get(path, 1.0))
        size = sum(tensor.size for tensor in factors.values()) + added.get(path, 0)
        ranks = _of_each_matrix(config, targets, named, rank, first, kept.get(path))
        if ranks is None:
            layers.append(InspectedLayer(named, kind, rank, first, scale, size))
            continue
        first = config["init_r"] if path in kept else first
        for name, own in zip(block_names(named, len(ranks)), ranks, strict=True):
            part = size * own // max(rank, 1)
            layers.append(InspectedLayer(name, "parameter", own, first, scale, part))
    return layers


def of_history(layers: list[InspectedLayer], history: RankHistory) -> list[InspectedLayer]:
    """Complete the layers of a plain LoRA folder from its history: ranks, initial ranks and layers at rank 0."""
    records = history.records
    if not records:
        return layers
    by_path, kinds = (
        {layer.path: layer for layer in layers},
        {_last_name(each.path): each.kind for each in layers},
    )
    found = []
    for path, first, rank in zip(history.layers, records[0].ranks, records[-1].ranks, strict=True):
        layer = by_path.get(path)
        if layer is None:
            found.append(InspectedLayer(path, kinds.get(_last_name(path), "linear"), 0, first, 0.0, 0))
        else:  # a stack's matrices are padded with zeros to the largest rank among them
            size = layer.parameters * rank // max(layer.rank, 1)
            found.append(replace(layer, rank=rank, init_r=first, parameters=size))
    return found


def _last_name(path: str) -> str:
    """The name that layers of one kind share: the last part of the path that is not a number."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)


def _gates(folder: Path, header: AdapterHeader) -> dict[str, float]:
    """The value of E in each layer, by path, for the form in which all kept triplets of a layer share one value."""
    config = header.config
    if config["peft_type"] != "ADALORA" or config.get("init_lora_weights") != "principal":
        return {}
    found = {name: factor_name(name.removeprefix(PREFIX)) for name in header.tensors}
    paths = {name: each.path for name, each in found.items() if each is not None and each.factor == "E"}
    tensors = read_tensors(folder / WEIGHTS_NAME, paths)
    # Triplets that were cut, if the file still holds them, have an E of 0.
    return {
        path: float(tensors[name].abs().max()) if len(tensors[name]) else 0.0 for name, path in paths.items()
    }


def _of_each_matrix(
    config: Mapping[str, Any], targets: list[str], path: str, rank: int, first: int, flags: list[bool] | None
) -> list[int] | None:
    """The ranks of the matrices in an adapted parameter, such as experts; None if ``path`` is a module."""
    if not any(f".{path}".endswith(f".{name}") for name in targets):
        return None
    if flags is None:  # plain LoRA gives all matrices one rank
        return [first] * (rank // first) if first and rank % first == 0 else None
    start = config["init_r"]
    return [sum(flags[place : place + start]) for place in range(0, len(flags), start)]


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
            f"{rank}. The two files belong to different adapters: copy both from one place."
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


def _scale(folder: Path, config: Mapping[str, Any], path: str, first: int, gate: float) -> float:
    """The number that the update B A is multiplied by. PEFT's AdaLoRA ignores ``alpha_pattern`` and ``use_rslora``.

    Args:
        folder: the adapter's folder.
        config: the adapter's configuration.
        path: the layer's path.
        first: the layer's rank at the start.
        gate: the value of E in the triplets that the layer keeps.
    """
    # the gates of kept ranks are part of this scale
    if config["peft_type"] == "ADALORA" and config.get("init_lora_weights") == "gated":
        return lora_scale(config["lora_alpha"], config["target_r"], bool(config.get("use_rslora")))
    if config["peft_type"] == "ADALORA":
        return adalora_scale(config["lora_alpha"], config["init_r"]) * gate
    alpha = _pattern(folder, config, "alpha_pattern", path, config["lora_alpha"])
    return lora_scale(alpha, first, bool(config.get("use_rslora"))) if first else 0.0
