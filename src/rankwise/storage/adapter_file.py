"""The content of an adapter folder in memory, and what it says of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.adapters import AdapterLayer
from rankwise.attach.matching import pattern_value
from rankwise.config import CONFIG_NAME, AdaLoraConfig, LoraConfig
from rankwise.run.history import RankHistory
from rankwise.run.pairs import block_names
from rankwise.storage.contents import sort_by_use
from rankwise.storage.names import PREFIX
from rankwise.storage.nesting import named_by_targets, unnested_paths


@dataclass
class AdapterFile:
    """The content of an adapter folder, checked as far as that goes without a model."""

    source: str
    config: LoraConfig
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> {"A": …, "B": …, "E": …}
    others: dict[str, Tensor] = field(default_factory=dict)  # biases and modules saved whole
    kinds: dict[str, type[AdapterLayer]] = field(default_factory=dict)  # path -> as its names tell it
    nested: dict[str, str] = field(default_factory=dict)  # path of a parameter -> its path in a LoRA file
    laid_out: bool = True  # as in a file, and not as in a layer
    history: RankHistory | None = None
    training: dict[str, Tensor] | None = None  # content of TRAINING_STATE_NAME
    training_source: str = ""
    run_config: AdaLoraConfig | None = None  # of the run in `training`, where ``config`` is not it
    # Of a folder that an earlier version wrote, as `rankwise.storage.earlier` changes it:
    of_weight: bool = False  # the factors of grouped convolutions are not in LoRA's layout
    scales: dict[str, float] = field(default_factory=dict)  # path -> scale in the state of the run

    def config_with(self, **changes: Any) -> LoraConfig:
        """The configuration with ``changes``; an error names the folder's file."""
        try:
            return replace(self.config, **changes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{Path(self.source).with_name(CONFIG_NAME)}: {error}") from None


def sort_tensors(source: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> AdapterFile:
    """Tensors under PEFT's names, sorted into layers' factors and others; ``source`` is where they come from."""
    contents = sort_by_use(source, tensors)
    file = AdapterFile(source, config, contents.factors, contents.others, contents.kinds)
    if config.target_parameters and not isinstance(config, AdaLoraConfig):
        name_parameters(file, named_by_targets(config.target_parameters))
    return file


def name_parameters(file: AdapterFile, names_of: Callable[[str], Sequence[str]]) -> None:
    """Give the factors of parameters their own paths; ``names_of`` as `unnested_paths` takes it."""
    as_in_file = {path: file.nested.get(path, path) for path in file.factors}
    paths = unnested_paths(as_in_file.values(), names_of)
    renamed = {path: paths.get(in_file, in_file) for path, in_file in as_in_file.items()}
    file.factors = {renamed[path]: factors for path, factors in file.factors.items()}
    file.kinds = {renamed[path]: kind for path, kind in file.kinds.items()}
    file.nested = {parameter: in_file for in_file, parameter in paths.items()}


def names_of_blocks(file: AdapterFile, path: str) -> list[str]:
    """What the blocks of the layer at ``path`` are called; see `block_names`."""
    return block_names(path, matrices_of(file, path) or 1)


def matrices_of(file: AdapterFile, path: str) -> int | None:
    """How many matrices are stacked in the parameter at ``path``; None if it is no parameter's."""
    config = file.config
    if not isinstance(config, AdaLoraConfig):
        rank = pattern_value(config.rank_pattern or {}, path, config.r)
        return max(len(file.factors[path]["A"]) // rank, 1) if path in file.nested else None
    if not any(f".{path}".endswith(f".{name}") for name in config.target_parameters or ()):
        return None
    return max(len(kept_by_pattern(config).get(path, [])) // config.init_r, 1)


def without_E(config: LoraConfig) -> bool:
    """Whether it is the default form of AdaLoRA, which has no third factor."""
    return isinstance(config, AdaLoraConfig) and not config.form.has_E


def kept_by_pattern(config: LoraConfig) -> dict[str, list[bool]]:
    """AdaLoRA's `rank_pattern` by module path."""
    pattern = (config.rank_pattern or {}) if isinstance(config, AdaLoraConfig) else {}
    return {key.removesuffix(".lora_E").removeprefix(PREFIX): kept for key, kept in pattern.items()}
