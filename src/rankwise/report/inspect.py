"""The contents of an adapter's folder, written by rankwise or by PEFT. The base model is not needed.

report = inspect_adapter("adapter")
print(report.total_rank, report.budget)
save_heatmap(report, "ranks.png")
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankwise.attach.matching import saved_module_of
from rankwise.config import CONFIG_NAME, AdaLoraConfig
from rankwise.files.atomic import read_folder
from rankwise.files.json_file import read_json
from rankwise.files.tensors import TensorInfo
from rankwise.method.forms import COUNTS_PARAMETERS
from rankwise.report.grid import grid_position, kind_order
from rankwise.report.layers import InspectedLayer, of_history, read_layers
from rankwise.run.history import RankHistory
from rankwise.run.summary import LayerRank, RankSummary
from rankwise.storage import (
    HISTORY_NAME,
    OWNED,
    PREFIX,
    TRAINING_CONFIG_NAME,
    TRAINING_STATE_NAME,
    WEIGHTS_NAME,
    checkpoint_step,
    read_header,
)


@dataclass(frozen=True)
class SavedModule:
    """A module that was trained and saved in full, such as a classification head.

    Args:
        path: the module's path in the base model.
        parameters: the number of its parameters.
    """

    path: str
    parameters: int


@dataclass(frozen=True)
class Checkpoint:
    """The point in a run at which a trainer saved a checkpoint. A value that the folder does not record is None.

    Args:
        step: the optimizer step.
        total_steps: the number of optimizer steps in the whole run.
        epoch: the epoch, with its fraction.
    """

    step: int | None
    total_steps: int | None
    epoch: float | None


@dataclass(frozen=True)
class AdapterReport:
    """The contents of an adapter's folder; ``to_dict`` returns them as plain data.

    Args:
        folder: the folder's path.
        base_model: the name or path of the base model, if it was recorded.
        method: how the adapter was trained: ``"AdaLoRA"``, ``"LoRA"``, ``"rsLoRA"`` or ``"DoRA"``.
        task_type: the kind of task, such as ``"CAUSAL_LM"``, if it was recorded.
        written_by: the library that wrote the folder, such as ``"PEFT 0.21.2"``, if it was recorded.
        init_r: the initial rank of AdaLoRA's layers; the largest rank of LoRA's.
        target_r: the average rank that AdaLoRA ends with; None for LoRA, and if it was not recorded.
        lora_alpha: the numerator of the scale.
        target_modules: the modules that the configuration adapts: a list of names, or a regular expression.
        layers: the adapted layers. A plain LoRA file has no tensors for layers at rank 0; these are listed if the
            history names them.
        target_parameters: parameters that the configuration adapts in addition to modules, such as experts.
        saved_modules: the modules that were trained and saved in full.
        bias_parameters: the number of parameters in trained biases.
        gate_parameters: the number of parameters in AdaLoRA's E. Plain LoRA has no E.
        other_parameters: the number of parameters in tensors whose purpose is unknown.
        dtypes: the number of parameters in the file by dtype, such as ``{"float32": 1024}``.
        files: the size of each file in the folder, in bytes.
        schedule: AdaLoRA's ``tinit``, ``tfinal``, ``total_step`` and ``deltaT``; None for LoRA.
        checkpoint: the point in the run, if the folder is a trainer's checkpoint.
        resumable: whether the folder holds the state from which training can be resumed.
        history: the ranks over the run, if they were saved.
        notes: remarks for the user about the folder.
        peft_type: the folder's format, ``"LORA"`` or ``"ADALORA"``. AdaLoRA's default form is saved as plain LoRA.

    Example:
        >>> report = AdapterReport("adapter", None, "LoRA", None, None, 8, None, 16, ["q_proj"], layers=[])
        >>> report.total_rank, report.target
        (0, None)
    """

    folder: str
    base_model: str | None
    method: str
    task_type: str | None
    written_by: str | None
    init_r: int
    target_r: float | None
    lora_alpha: float
    target_modules: list[str] | str | None
    layers: list[InspectedLayer]
    target_parameters: list[str] = field(default_factory=list)
    saved_modules: list[SavedModule] = field(default_factory=list)
    bias_parameters: int = 0
    gate_parameters: int = 0
    other_parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    schedule: dict[str, Any] | None = None
    checkpoint: Checkpoint | None = None
    resumable: bool = False
    history: RankHistory | None = None
    notes: list[str] = field(default_factory=list)
    peft_type: str = "LORA"

    @property
    def total_rank(self) -> int:
        """The sum of all layers' ranks."""
        return sum(layer.rank for layer in self.layers)

    @property
    def budget(self) -> int:
        """The sum of all layers' initial ranks."""
        return sum(layer.init_r for layer in self.layers)

    @property
    def target(self) -> int | None:
        """The sum of all ranks that AdaLoRA ends with; None for LoRA."""
        return None if self.target_r is None else round(self.target_r * len(self.layers))

    @property
    def parameters(self) -> int:
        """The number of parameters in the whole file."""
        return sum(self.dtypes.values())

    @property
    def scale(self) -> float | None:
        """The scale that all layers with a rank above 0 share; None if they differ or no layer has one."""
        scales = {layer.scale for layer in self.layers if layer.rank}
        return scales.pop() if len(scales) == 1 else None

    def summary(self) -> RankSummary:
        """The ranks in the form that a model gives them. A file holds no importance, so it is NaN."""
        layers = [
            LayerRank(layer.path, layer.rank, layer.init_r, math.nan, layer.parameters)
            for layer in self.layers
        ]
        return RankSummary(layers, self.budget)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON. The history has the form of its own file."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **data,
            "total_rank": self.total_rank,
            "budget": self.budget,
            "target": self.target,
            "scale": self.scale,
            "parameters": self.parameters,
            "layers": [asdict(layer) for layer in self.layers],
            "saved_modules": [asdict(module) for module in self.saved_modules],
            "checkpoint": None if self.checkpoint is None else asdict(self.checkpoint),
            "history": None if self.history is None else json.loads(self.history.to_json()),
        }


def inspect_adapter(folder: str | os.PathLike[str]) -> AdapterReport:
    """Read the folder of a LoRA or AdaLoRA adapter, or a trainer's checkpoint that holds one.

    Only the configuration and the header of the tensor file are read.

    Args:
        folder: a folder that rankwise or PEFT wrote.

    Returns:
        The method, the layers with their ranks, the parameter counts, and everything else that the folder records.

    Raises:
        ValueError: the folder holds no adapter, or the adapter is broken, cut off or mislabelled. The message names
            the file, the fault and the remedy.

    Example:
        >>> import tempfile, torch, rankwise
        >>> config = rankwise.LoraConfig(r=2, target_modules=["0"])
        >>> model = rankwise.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     report = inspect_adapter(folder)
        >>> report.method, report.total_rank, report.parameters
        ('LoRA', 2, 24)
    """
    try:
        return read_folder(Path(folder), OWNED, _read)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None


def _read(folder: Path) -> AdapterReport:
    header = read_header(folder)
    config = header.config
    rest = _rest(config, header.contents.others)
    if not header.contents.factors and (rest.others or not rest.saved):
        raise ValueError(
            f"{folder / WEIGHTS_NAME} holds no LoRA tensors, but {_found(header.tensors)}. It is another kind of file."
        )
    adalora = config["peft_type"] == "ADALORA"
    layers = read_layers(folder, header, rest.added)
    history, notes = _history(folder, config, layers)
    run, more = _run(folder, config)
    notes = [*_mismatches(config, layers), *_unprefixed(header.tensors), *notes, *more]
    if history is not None and not adalora:
        layers = of_history(layers, history)
    if run:
        notes += _unfinished(run, layers, history)
    dtypes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        dtypes[tensor.dtype] += tensor.size
    return AdapterReport(
        folder=str(folder),
        base_model=_text(config, "base_model_name_or_path"),
        method="AdaLoRA" if run or history is not None else _method(config),
        task_type=_text(config, "task_type"),
        written_by=f"PEFT {config['peft_version']}" if _text(config, "peft_version") else None,
        init_r=run["init_r"] if run else max((layer.init_r for layer in layers), default=config["r"]),
        target_r=run["target_r"] if run else None,
        lora_alpha=config["lora_alpha"],
        target_modules=_targets(config),
        layers=_in_order(layers, history),
        target_parameters=sorted(map(str, config.get("target_parameters") or ())),
        saved_modules=[SavedModule(path, size) for path, size in sorted(rest.saved.items())],
        bias_parameters=rest.biases,
        gate_parameters=sum(each["E"].size for each in header.contents.factors.values() if "E" in each),
        other_parameters=rest.others,
        dtypes=dict(dtypes),
        files={each.name: each.stat().st_size for each in sorted(folder.iterdir()) if each.is_file()},
        schedule={name: run.get(name) for name in SCHEDULE} if run else None,
        checkpoint=_checkpoint(folder),
        resumable=(folder / TRAINING_STATE_NAME).is_file(),
        history=history,
        notes=notes,
        peft_type=config["peft_type"],
    )


SCHEDULE = ("tinit", "tfinal", "total_step", "deltaT")
_ADDED = re.compile(r"(?P<path>.+)\.lora_(magnitude_vector(\.weight)?|[AB]\.bias)")  # DoRA; `lora_bias`
# with bias="all", PEFT saves heads twice
_COPIES = re.compile(r"(.*\.)?(original_module|modules_to_save)\..+")


@dataclass
class _Rest:
    """The number of parameters outside the factors, by purpose."""

    added: Counter[str] = field(default_factory=Counter)  # by path of the layer that they belong to
    saved: Counter[str] = field(default_factory=Counter)  # by path of the module that was saved in full
    biases: int = 0
    others: int = 0


def _rest(config: Mapping[str, Any], others: Mapping[str, TensorInfo]) -> _Rest:
    rest = _Rest()
    heads = [name for name in config.get("modules_to_save") or [] if isinstance(name, str)]
    for name, tensor in others.items():
        if match := _ADDED.fullmatch(name):
            rest.added[match["path"]] += tensor.size
        elif head := saved_module_of(name, heads, lambda path: True):
            rest.saved[head] += 0 if _COPIES.fullmatch(name.removeprefix(f"{head}.")) else tensor.size
        elif name.endswith(".bias"):
            rest.biases += tensor.size
        else:
            rest.others += tensor.size
    return rest


def _found(header: Mapping[str, TensorInfo]) -> str:
    return f"{len(header):,} others, such as {next(iter(header))!r}" if header else "nothing at all"


def _unprefixed(header: Mapping[str, TensorInfo]) -> list[str]:
    odd = next((key for key in header if not key.startswith(PREFIX)), None)
    told = f"{odd!r} and maybe more do not begin with {PREFIX!r}: PEFT will not find them."
    return [] if odd is None else [told]


def _in_order(layers: list[InspectedLayer], history: RankHistory | None) -> list[InspectedLayer]:
    """Sort the layers as the history lists them, or else by their paths: a file lists them alphabetically."""
    if history is not None and {layer.path for layer in layers} == set(history.layers):
        by_path = {layer.path: layer for layer in layers}
        return [by_path[path] for path in history.layers]

    def key(layer: InspectedLayer) -> tuple[Any, ...]:
        place = grid_position(layer.path)
        numbers = [int(part) for part in re.findall(r"\d+", place.stack)]
        words = re.sub(r"\d+", "0", place.stack)
        loose = place.layer is None
        order = (0, 0) if loose else kind_order(place.kind)
        return loose, "decoder" in words, words, numbers, place.layer or 0, order, layer.path

    return sorted(layers, key=key)


# The other files in the folder.


def _history(
    folder: Path, config: Mapping[str, Any], layers: list[InspectedLayer]
) -> tuple[RankHistory | None, list[str]]:
    path = folder / HISTORY_NAME
    if not path.is_file():
        return None, []
    try:
        history = RankHistory.load(path)
    except ValueError as error:
        return None, [f"The history is left out: {error}"]
    last = dict(zip(history.layers, history.records[-1].ranks, strict=True)) if history.records else {}
    beside = set(history.layers) - {layer.path for layer in layers}
    foreign = {layer.path for layer in layers} - set(history.layers)
    # A plain LoRA file has no tensors for layers at rank 0.
    if foreign or any(config["peft_type"] == "ADALORA" or last.get(path) != 0 for path in beside):
        return None, [f"The history is left out: {HISTORY_NAME} is of other layers than {WEIGHTS_NAME}."]
    return history, []


def _run(folder: Path, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The run's AdaLoRA configuration, and notes. The configuration is empty if the folder records none."""
    if config["peft_type"] == "ADALORA":
        return config, []
    path = folder / TRAINING_CONFIG_NAME
    if not path.is_file():
        return {}, []
    try:
        content = read_json(path)
        run = AdaLoraConfig.from_dict(content["config"] if isinstance(content, dict) else {}, str(path))
    except (KeyError, TypeError, ValueError) as error:
        return {}, [f"The settings of the training are left out: {error}"]
    return run.to_dict(), []


def _checkpoint(folder: Path) -> Checkpoint | None:
    named = checkpoint_step(folder.absolute())
    path = folder / "trainer_state.json"
    if named is None and not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        state = {}
    state = state if isinstance(state, dict) else {}
    step, total, epoch = (state.get(name) for name in ("global_step", "max_steps", "epoch"))
    return Checkpoint(
        step if isinstance(step, int) else named,
        total if isinstance(total, int) and total > 0 else None,
        float(epoch) if isinstance(epoch, (int, float)) and math.isfinite(epoch) else None,
    )


def _method(config: Mapping[str, Any]) -> str:
    if config["peft_type"] == "ADALORA":
        return "AdaLoRA"
    if config.get("use_dora"):
        return "DoRA"
    return "rsLoRA" if config.get("use_rslora") else "LoRA"


def _targets(config: Mapping[str, Any]) -> list[str] | str | None:
    targets = config.get("target_modules")
    return (
        sorted(map(str, targets)) if isinstance(targets, list) else None if targets is None else str(targets)
    )


def _text(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name)
    return value if isinstance(value, str) and value else None


def _mismatches(config: Mapping[str, Any], layers: list[InspectedLayer]) -> list[str]:
    """Report layers whose rank differs from the configuration: such an adapter can't be loaded."""
    pattern = config.get("rank_pattern") or {} if config["peft_type"] == "ADALORA" else {}
    cut = {key.removeprefix(PREFIX).removesuffix(".lora_E") for key in pattern}
    odd = [layer for layer in layers if layer.rank != layer.init_r and layer.path not in cut]
    if not odd or config.get("target_parameters"):
        return []
    more = f" (and {len(odd) - 1:,} more layers)" if len(odd) > 1 else ""
    return [
        f"{CONFIG_NAME} gives {odd[0].path!r} rank {odd[0].init_r}, but its tensors have {odd[0].rank}{more}: "
        "loading will fail."
    ]


def _unfinished(
    config: Mapping[str, Any], layers: list[InspectedLayer], history: RankHistory | None
) -> list[str]:
    """Report a budget above its target. A budget that counts parameters is recorded in the history alone."""
    budget, target = sum(layer.rank for layer in layers), round(config["target_r"] * len(layers))
    if config.get("init_lora_weights") in COUNTS_PARAMETERS:
        budget = history.records[-1].budget if history is not None and history.records else target
    if budget <= target:
        return []
    return [f"Saved before pruning was done: the budget is {budget:,}, its target {target:,}."]
