"""Reads folders of AdaLoRA's default form that earlier versions wrote.

They are in PEFT's AdaLoRA format. Their E is frozen: 0 for ranks that were cut, and for the others a number that
multiplies the scale. They are converted to plain LoRA, as this version writes it. The state of an unfinished run is
converted in the same way.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rankwise.adapters.parameter import ParameterAdapters
from rankwise.config import AdaLoraConfig
from rankwise.method.scale import adalora_scale
from rankwise.run.state import RunState
from rankwise.storage.adapter_file import AdapterFile, kept_by_pattern, matrices_of, names_of_blocks
from rankwise.storage.lora_layout import Update, in_file_order, lora_config, stack_of, with_a_rank
from rankwise.storage.names import EXTRA_STATE
from rankwise.storage.nesting import nested_paths


def as_plain_lora(file: AdapterFile) -> AdapterFile:
    """Convert a folder of AdaLoRA's default form with E to plain LoRA, and the state of its run to one without E.

    Raises:
        ValueError: the state of the run is broken.
    """
    run_config, training = None, file.training
    scales: dict[str, float] = {}
    if training is not None:
        run_config = _run_config(file)
        training, scales = _without_E(training, run_config)
    config: AdaLoraConfig = file.config  # type: ignore[assignment]
    layers = {path: _matrices(file, path, config) for path in file.factors}
    acting = with_a_rank(layers)
    stacks = in_file_order(config, (path for path in acting if matrices_of(file, path) is not None))
    whole = {path: stack_of(own) if path in stacks else own[0] for path, own in acting.items()}
    sizes = {path: (each.rank // len(acting[path]), each.scale) for path, each in whole.items()}
    return replace(
        file,
        config=lora_config(config, sizes, stacks, file.factors.keys() - acting.keys(), modules=None),
        factors={path: {"A": each.A, "B": each.B} for path, each in whole.items()},
        kinds={path: file.kinds[path] for path in whole},
        nested=nested_paths(stacks),
        of_weight=True,
        training=training,
        run_config=run_config,
        scales=scales,
    )


def _matrices(file: AdapterFile, path: str, config: AdaLoraConfig) -> list[Update]:
    """The update of each of a layer's matrices, with the ranks whose gate is not 0."""
    A, E, B = (file.factors[path][key] for key in ("A", "E", "B"))
    matrices = matrices_of(file, path)
    B, scale = _folded(B, E, config)
    kind = file.kinds[path] if matrices is None else ParameterAdapters
    kept = torch.tensor(kept_by_pattern(config).get(path, [True] * len(A)), dtype=torch.bool, device="cpu")
    counts = kept.view(matrices or 1, -1).sum(1).tolist()
    parts = zip(A.split(counts), B.split(counts, dim=1), E.flatten().split(counts), strict=True)
    return [Update(a[e != 0], b[:, e != 0], kind, scale=scale) for a, b, e in parts]


def _folded(B: Tensor, E: Tensor, config: AdaLoraConfig) -> tuple[Tensor, float]:
    """Multiply E into B, except for the layer's largest gate, which is returned in the scale."""
    gates = E.flatten()
    largest = float(gates.abs().max()) if len(gates) else 0.0
    scale = adalora_scale(config.lora_alpha, config.init_r) * (largest or 1.0)
    return B * (gates / (largest or 1.0)).to(B.dtype), scale


# The state of a run.


def _run_config(file: AdapterFile) -> AdaLoraConfig:
    """The configuration with which the run continues."""
    packed = (file.training or {}).get(EXTRA_STATE)
    if packed is None:
        raise ValueError(f"{file.training_source} lacks {EXTRA_STATE!r}.")
    try:
        state = RunState.from_tensor(
            [name for path in file.factors for name in names_of_blocks(file, path)], packed
        )
    except ValueError as error:
        raise ValueError(f"{file.training_source}: {error}") from None
    changes = {"inference_mode": False, "rank_pattern": None}
    if state.schedule is None:
        changes["total_step"] = None
    return file.config_with(**changes)  # type: ignore[return-value]


def _without_E(
    training: dict[str, Tensor], config: AdaLoraConfig
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state of a run without E, with 0 in A and B where the gate was 0; and the scale of each layer."""
    changed, scales = dict(training), {}
    for name, E in training.items():
        path, found, _ = name.rpartition(".lora_E")
        A, B = training.get(f"{path}.lora_A"), training.get(f"{path}.lora_B")
        if not found or A is None or B is None or E.shape != (len(A), 1):
            continue
        del changed[name]
        B, scales[path] = _folded(B, E, config)
        changed |= {f"{path}.lora_A": A * (E != 0), f"{path}.lora_B": B}
    return changed, scales
