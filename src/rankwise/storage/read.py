"""Reading an adapter folder, whole or as far as its header goes, and all checks of it that need no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters import KINDS, AdapterLayer
from rankwise.adapters.parameter import stacked_columns
from rankwise.attach.matching import pattern_value
from rankwise.config import CONFIG_NAME, AdaLoraConfig, LoraConfig
from rankwise.files.atomic import read_folder
from rankwise.files.tensors import (
    TensorInfo,
    check_finite,
    read_pickle,
    read_tensor_file,
    read_tensor_header,
)
from rankwise.run.history import RankHistory
from rankwise.run.triplets import block_names
from rankwise.storage.contents import (
    Contents,
    check_complete,
    check_pattern_names,
    common_rank,
    sort_by_use,
)
from rankwise.storage.folder import check_folder, holds, read_config
from rankwise.storage.names import (
    HISTORY_NAME,
    OWNED,
    PICKLE_NAME,
    PREFIX,
    TRAINING_STATE_NAME,
    WEIGHTS_NAME,
)
from rankwise.storage.nesting import named_by_targets, unnested_paths

_CONVERT = (
    "import torch; from safetensors.torch import save_file; "
    "tensors = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "
    "'adapter_model.safetensors', metadata={'format': 'pt'})"
)


@dataclass
class AdapterHeader:
    """What an adapter folder tells before any tensor is read.

    Args:
        config: the content of the configuration's file, in which there may be fields that rankwise doesn't know.
        tensors: shapes and dtypes, by the names in the file.
        contents: the same by what they are for.
        ranks: of the tensors of each layer, by path.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    contents: Contents[TensorInfo]
    ranks: dict[str, int]


def read_header(folder: Path) -> AdapterHeader:
    """Read an adapter folder as far as the header of its tensors; call it within `read_folder`.

    Raises:
        FileNotFoundError: it is no adapter folder.
        ValueError: a file is missing, broken, cut off or mislabelled; the message names it.
    """
    check_folder(folder)
    config = read_config(folder)
    path = folder / WEIGHTS_NAME
    if not holds(folder, WEIGHTS_NAME):
        raise ValueError(_no_header(folder))
    tensors = read_tensor_header(path)
    contents = sort_by_use(str(path), tensors)
    check_complete(str(path), str(folder / CONFIG_NAME), config["peft_type"], contents.factors)
    ranks = {
        layer: common_rank(str(path), layer, own, contents.kinds[layer])
        for layer, own in contents.factors.items()
    }
    return AdapterHeader(config, tensors, contents, ranks)


def _no_header(folder: Path) -> str:
    if not holds(folder, PICKLE_NAME):
        return f"{folder} is incomplete: it has {CONFIG_NAME}, but no {WEIGHTS_NAME}."
    return (
        f"{folder} has its tensors only as {PICKLE_NAME}: a pickle, which has no header to read and can run code "
        f'when it is opened. If you trust it, convert it, in that folder: python -c "{_CONVERT}"'
    )


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

    def config_with(self, **changes: Any) -> LoraConfig:
        """The configuration with ``changes``; an error names the folder's file."""
        try:
            return replace(self.config, **changes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{Path(self.source).with_name(CONFIG_NAME)}: {error}") from None


def read_adapter(folder: Path, training_state: bool = False, config: LoraConfig | None = None) -> AdapterFile:
    """Read an adapter folder, with ``training_state`` also the state of the run, if there is one.

    A ``config`` takes the place of the folder's, which then need not have one.

    Raises:
        FileNotFoundError: it is no adapter folder.
        TypeError, ValueError: a file is broken or does not fit the others; the message names it.
    """
    return read_folder(folder, OWNED, lambda found: _read(found, training_state, config))


def _read(folder: Path, training_state: bool, config: LoraConfig | None) -> AdapterFile:
    if config is None:
        check_folder(folder)
        config = LoraConfig.from_pretrained(folder)
    tensors, source = _read_tensors(folder)
    file = sort_tensors(source, config, tensors)
    check_factors(file)
    if holds(folder, HISTORY_NAME):
        file.history = RankHistory.load(folder / HISTORY_NAME)
        if set(file.history.layers) != {
            name for path in file.factors for name in names_of_blocks(file, path)
        }:
            raise ValueError(
                f"{folder / HISTORY_NAME} is of other layers than {source}: one is another adapter's."
            )
    if training_state and holds(folder, TRAINING_STATE_NAME):
        file.training_source = str(folder / TRAINING_STATE_NAME)
        file.training = read_tensor_file(folder / TRAINING_STATE_NAME)
        _check_same_run(file)
    return file


def _check_same_run(file: AdapterFile) -> None:
    """Refuse a state that is not the one that the adapter's tensors were cut from."""
    pattern = kept_by_pattern(file.config)
    for path, factors in file.factors.items():
        for name, tensor in factors.items():
            if path in file.nested and name == "B":
                rank = pattern_value(file.config.rank_pattern or {}, path, file.config.r)
                tensor = stacked_columns(tensor, max(len(factors["A"]) // rank, 1))
            whole = (file.training or {}).get(f"{path}.lora_{name}")
            if whole is not None and whole.dim() == 2 and path in pattern:
                kept = torch.tensor(pattern[path])
                whole = whole[:, kept[: whole.shape[1]]] if name == "B" else whole[kept[: whole.shape[0]]]
            if whole is None or whole.dim() != 2 or not torch.equal(whole, tensor.flatten(1)):
                raise ValueError(
                    f"{file.training_source} and {file.source} differ in lora_{name} of {path!r}: they were not "
                    f"saved together. Use another checkpoint; or remove {TRAINING_STATE_NAME}, and the adapter's "
                    "values are taken without the run."
                )
    held = {key.replace(".modules_to_save.", "."): tensor for key, tensor in (file.training or {}).items()}
    for key, tensor in file.others.items():
        whole = held.get(key.replace(".base_layer.", "."))
        if whole is not None and not torch.equal(whole, tensor):
            raise ValueError(
                f"{file.training_source} and {file.source} differ in {key!r}: they were not saved together."
            )


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


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    if holds(folder, WEIGHTS_NAME):
        return read_tensor_file(folder / WEIGHTS_NAME), str(folder / WEIGHTS_NAME)
    if not holds(folder, PICKLE_NAME):
        raise FileNotFoundError(f"{str(folder)!r} holds no {WEIGHTS_NAME}, so it is not a whole adapter.")
    return read_pickle(folder / PICKLE_NAME), str(folder / PICKLE_NAME)


def check_factors(file: AdapterFile, cut: bool = True) -> None:
    """Check kinds, numbers and dimensions of the factors; if ``cut`` to `rank_pattern`, also the ranks."""
    adalora = isinstance(file.config, AdaLoraConfig)
    dims = {2} if adalora else {kind.file_dims for kind in KINDS} | {2}
    if not file.factors and not file.others:
        raise ValueError(f"{file.source} holds no adapter tensors.")
    config_path = str(Path(file.source).with_name(CONFIG_NAME))
    check_complete(file.source, config_path, file.config.peft_type, file.factors)
    for path, factors in file.factors.items():
        common_rank(file.source, path, factors, file.kinds[path])
        for name, tensor in factors.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{file.source}: lora_{name} of {path!r} is {tensor.dtype}, not floating point."
                )
            if tensor.dim() not in dims:
                raise ValueError(
                    f"{file.source}: lora_{name} of {path!r} has the shape {tuple(tensor.shape)}, which no layer takes."
                )
            check_finite(file.source, f"lora_{name} of {path!r}", tensor)
    if adalora and not file.factors:
        raise ValueError(f"{file.source} holds no lora_A, lora_E and lora_B, but {CONFIG_NAME} says ADALORA.")
    if adalora and cut:
        _check_rank_pattern(file)


def _check_rank_pattern(file: AdapterFile) -> None:
    config: AdaLoraConfig = file.config  # type: ignore[assignment]
    pattern = kept_by_pattern(config)
    check_pattern_names(file.source, pattern, file.factors)
    for path, factors in file.factors.items():
        rank = sum(pattern[path]) if path in pattern else config.init_r
        shapes = {name: tuple(tensor.shape) for name, tensor in factors.items()}
        if factors["E"].shape != (rank, 1) or factors["A"].shape[0] != rank or factors["B"].shape[-1] != rank:
            raise ValueError(
                f"{file.source}: {path!r} should have {rank} triplets by {CONFIG_NAME} "
                f"({'`rank_pattern`' if path in pattern else '`init_r`'}), but its tensors are {shapes}."
            )


def names_of_blocks(file: AdapterFile, path: str) -> list[str]:
    """What the blocks of the layer at ``path`` are called; see `block_names`."""
    if not isinstance(file.config, AdaLoraConfig):
        return [path]
    kept = kept_by_pattern(file.config).get(path, [])
    return block_names(path, max(len(kept) // file.config.init_r, 1))


def kept_by_pattern(config: LoraConfig) -> dict[str, list[bool]]:
    """AdaLoRA's `rank_pattern` by module path."""
    pattern = (config.rank_pattern or {}) if isinstance(config, AdaLoraConfig) else {}
    return {key.removesuffix(".lora_E").removeprefix(PREFIX): kept for key, kept in pattern.items()}
