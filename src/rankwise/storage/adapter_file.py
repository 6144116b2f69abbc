"""The contents of an adapter folder in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.adapters import AdapterLayer
from rankwise.attach.matching import pattern_value
from rankwise.config import CONFIG_NAME, AdaLoraConfig, LoraConfig
from rankwise.parallel.wrappers import without
from rankwise.run.history import RankHistory
from rankwise.run.pairs import block_names
from rankwise.storage.contents import sort_by_use
from rankwise.storage.names import PREFIX
from rankwise.storage.nesting import named_by_targets, unnested_paths


@dataclass
class AdapterFile:
    """The contents of an adapter folder. Everything that needs no model has been checked."""

    source: str
    config: LoraConfig
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by path: {"A": …, "B": …, "E": …}
    others: dict[str, Tensor] = field(default_factory=dict)  # biases and modules that were saved in full
    # by path, as the tensors' names tell it
    kinds: dict[str, type[AdapterLayer]] = field(default_factory=dict)
    nested: dict[str, str] = field(default_factory=dict)  # by a parameter's path: its path in a LoRA file
    laid_out: bool = True  # whether tensors have a file's layout, not a layer's
    history: RankHistory | None = None
    training: dict[str, Tensor] | None = None  # the contents of TRAINING_STATE_NAME
    training_source: str = ""
    # the configuration of the run in `training`, if it is not ``config``
    run_config: AdaLoraConfig | None = None
    # For a folder of an earlier version, changed by `rankwise.storage.earlier`:
    of_weight: bool = False  # whether factors of grouped convolutions are in another layout than LoRA's
    scales: dict[str, float] = field(default_factory=dict)  # by path: the scale in the state of the run

    def config_with(self, **changes: Any) -> LoraConfig:
        """The configuration with ``changes``. An error names the folder's configuration file."""
        try:
            return replace(self.config, **changes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{Path(self.source).with_name(CONFIG_NAME)}: {error}") from None


def sort_tensors(source: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> AdapterFile:
    """Sort tensors with PEFT's names into layers' factors and others; ``source`` names their origin in messages."""
    contents = sort_by_use(source, tensors)
    file = AdapterFile(source, config, contents.factors, contents.others, contents.kinds)
    if config.target_parameters and not isinstance(config, AdaLoraConfig):
        name_parameters(file, named_by_targets(config.target_parameters))
    return file


def name_parameters(file: AdapterFile, names_of: Callable[[str], Sequence[str]]) -> None:
    """Move the factors of parameters to the parameters' own paths; for ``names_of`` see `unnested_paths`."""
    as_in_file = {path: file.nested.get(path, path) for path in file.factors}
    paths = unnested_paths(as_in_file.values(), names_of)
    renamed = {path: paths.get(in_file, in_file) for path, in_file in as_in_file.items()}
    file.factors = {renamed[path]: factors for path, factors in file.factors.items()}
    file.kinds = {renamed[path]: kind for path, kind in file.kinds.items()}
    file.nested = {parameter: in_file for in_file, parameter in paths.items()}


def names_of_blocks(file: AdapterFile, path: str) -> list[str]:
    """The names of the blocks in the layer at ``path``; see `block_names`."""
    return block_names(path, matrices_of(file, path) or 1)


def matrices_of(file: AdapterFile, path: str) -> int | None:
    """The number of matrices stacked in the parameter at ``path``; None if ``path`` is a module."""
    config = file.config
    if not isinstance(config, AdaLoraConfig):
        rank = pattern_value(config.rank_pattern or {}, path, config.r)
        return max(len(file.factors[path]["A"]) // rank, 1) if path in file.nested else None
    if not any(f".{path}".endswith(f".{name}") for name in config.target_parameters or ()):
        return None
    return max(len(kept_by_pattern(config).get(path, [])) // config.init_r, 1)


def without_E(config: LoraConfig) -> bool:
    """Whether the configuration is of AdaLoRA's default form, which has no third factor."""
    return isinstance(config, AdaLoraConfig) and not config.form.has_E


def kept_by_pattern(config: LoraConfig) -> dict[str, list[bool]]:
    """AdaLoRA's `rank_pattern`, by module path."""
    pattern = (config.rank_pattern or {}) if isinstance(config, AdaLoraConfig) else {}
    return {without(key.removesuffix(".lora_E").removeprefix(PREFIX)): kept for key, kept in pattern.items()}
