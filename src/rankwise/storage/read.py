"""Reads an adapter folder, or only its header, with all checks that need no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters import KINDS
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
from rankwise.run.run_tensors import BUFFERS
from rankwise.storage.adapter_file import (
    AdapterFile,
    kept_by_pattern,
    names_of_blocks,
    sort_tensors,
    without_E,
)
from rankwise.storage.contents import (
    Contents,
    check_complete,
    check_pattern_names,
    common_rank,
    sort_by_use,
)
from rankwise.storage.earlier import as_plain_lora
from rankwise.storage.folder import check_folder, holds, read_config
from rankwise.storage.names import (
    HISTORY_NAME,
    OWNED,
    PICKLE_NAME,
    TRAINING_CONFIG_NAME,
    TRAINING_STATE_NAME,
    WEIGHTS_NAME,
)
from rankwise.storage.run_config import read_run_config

_CONVERT = (
    "import torch; from safetensors.torch import save_file; "
    "tensors = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "
    "'adapter_model.safetensors', metadata={'format': 'pt'})"
)


@dataclass
class AdapterHeader:
    """The contents of an adapter folder without the tensors' values.

    Args:
        config: the content of the configuration file. It may have fields that rankwise does not know.
        tensors: shapes and dtypes, by name in the file.
        contents: shapes and dtypes, sorted by purpose.
        ranks: the rank of each layer's tensors, by path.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    contents: Contents[TensorInfo]
    ranks: dict[str, int]


def read_header(folder: Path) -> AdapterHeader:
    """Read an adapter folder's configuration and tensor header. Call it within `read_folder`.

    Raises:
        FileNotFoundError: the folder is not an adapter folder.
        ValueError: a file is missing, broken, cut off or mislabelled. The message names it.
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


def read_adapter(folder: Path, training_state: bool = False, config: LoraConfig | None = None) -> AdapterFile:
    """Read an adapter folder.

    Args:
        folder: the folder.
        training_state: whether to read the state of the run as well, if there is one.
        config: a configuration to use instead of the folder's own, which may then be missing.

    Raises:
        FileNotFoundError: the folder is not an adapter folder.
        TypeError, ValueError: a file is broken or does not fit the others. The message names it.
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
        _check_history(file, folder / HISTORY_NAME)
    if training_state and holds(folder, TRAINING_STATE_NAME):
        file.training_source = str(folder / TRAINING_STATE_NAME)
        file.training = read_tensor_file(folder / TRAINING_STATE_NAME)
        if holds(folder, TRAINING_CONFIG_NAME):
            file.run_config = read_run_config(folder, tensors)
        elif not isinstance(config, AdaLoraConfig) and BUFFERS[-1] in file.training:
            raise ValueError(
                f"{folder} is incomplete: it has {TRAINING_STATE_NAME}, but no {TRAINING_CONFIG_NAME}, which says how "
                "the run goes on. Copy it from where the checkpoint was saved."
            )
        else:
            _check_same_run(file)
    return as_plain_lora(file) if without_E(config) else file


def _check_history(file: AdapterFile, path: Path) -> None:
    """Refuse another adapter's history: it must name all layers in the file, and in addition only layers at rank 0."""
    history: RankHistory = file.history  # type: ignore[assignment]
    held = {name for path in file.factors for name in names_of_blocks(file, path)}
    last = dict(zip(history.layers, history.records[-1].ranks, strict=True)) if history.records else {}
    beside = {name for name in history.layers if name not in held}
    adalora = isinstance(file.config, AdaLoraConfig)
    if not held <= set(history.layers) or any(adalora or last.get(name) != 0 for name in beside):
        raise ValueError(f"{path} is of other layers than {file.source}: one is another adapter's.")


def _check_same_run(file: AdapterFile) -> None:
    """Refuse a run's state that the adapter's tensors were not cut from."""
    pattern = kept_by_pattern(file.config)
    for path, factors in file.factors.items():
        for name, tensor in factors.items():
            if path in file.nested and name == "B":
                rank = pattern_value(file.config.rank_pattern or {}, path, file.config.r)
                tensor = stacked_columns(tensor, max(len(factors["A"]) // rank, 1))
            whole = (file.training or {}).get(f"{path}.lora_{name}")
            if whole is not None and whole.dim() == 2 and path in pattern:
                kept = torch.tensor(pattern[path], device="cpu")
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


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    if holds(folder, WEIGHTS_NAME):
        return read_tensor_file(folder / WEIGHTS_NAME), str(folder / WEIGHTS_NAME)
    if not holds(folder, PICKLE_NAME):
        raise FileNotFoundError(f"{str(folder)!r} holds no {WEIGHTS_NAME}, so it is not a whole adapter.")
    return read_pickle(folder / PICKLE_NAME), str(folder / PICKLE_NAME)


def check_factors(file: AdapterFile, cut: bool = True) -> None:
    """Check the kinds, dtypes and dimensions of the factors, and if ``cut``, their ranks against `rank_pattern`.

    Factors of a run in the default form have no E, unless an earlier version wrote them.
    """
    adalora = isinstance(file.config, AdaLoraConfig)
    with_E = adalora and not (without_E(file.config) and file.laid_out is False)
    dims = {2} if adalora else {kind.file_dims for kind in KINDS} | {2}
    if not file.factors and not file.others:
        raise ValueError(f"{file.source} holds no adapter tensors.")
    config_path = str(Path(file.source).with_name(CONFIG_NAME))
    check_complete(file.source, config_path, "ADALORA" if with_E else "LORA", file.factors)
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
