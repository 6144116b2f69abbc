"""What an adapter adds to each layer, as two factors, whatever kind of adapter it is; and writing that as LoRA.

AdaLoRA's update s * B diag(E) A and LoRA's s * B A both become B A, with scale and E multiplied into A. This is exact:
no product is formed and nothing is approximated. Written again with alpha equal to the rank, every layer's scale is 1.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.adapters import AdapterLayer
from rankwise.adapters.parameter import ParameterAdapters, stacked_columns
from rankwise.attach.attachment import adapter_layers, base_scaling
from rankwise.attach.matching import pattern_value
from rankwise.config import CONFIG_NAME, AdaLoraConfig, LoraConfig
from rankwise.files.atomic import write_folder
from rankwise.run.triplets import block_names
from rankwise.storage import OWNED, PREFIX, WEIGHTS_NAME, AdapterFile, read_adapter, read_model_adapter
from rankwise.storage.nesting import by_owner, named_by_targets, nested_paths
from rankwise.storage.read import kept_by_pattern, names_of_blocks

if TYPE_CHECKING:
    from rankwise.model import PeftModel

_KEPT_EXTRA = ("auto_mapping",)  # says which class the base model has


@dataclass(frozen=True)
class Update:
    """The change B A of one layer's weight.

    Args:
        A: (rank, d_in), with the scale and AdaLoRA's E in it.
        B: (d_out, rank), or (d_out, rank / groups) for a grouped convolution in LoRA's layout.
        kind: of layer, which knows how a file names the factors. An embedding has d_in entries.
        kernel: size of a convolution's kernel in each dimension, whose d_in is channels * their product.
    """

    A: Tensor
    B: Tensor
    kind: type[AdapterLayer]
    kernel: tuple[int, ...] = ()

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


@dataclass(frozen=True)
class Updates:
    """All that an adapter adds to a model.

    Args:
        source: where it comes from, for messages.
        config: the adapter's configuration.
        layers: the update of each layer by its path, those at rank 0 included. Each matrix of a stack is a layer of
            its own, called by its number: ``"mlp.experts.up.3"``.
        others: biases and modules saved whole, by their names in the file.
        stacks: for each stack of matrices, such as experts, its path and what its matrices are called.
    """

    source: str
    config: LoraConfig
    layers: Mapping[str, Update]
    others: Mapping[str, Tensor]
    stacks: Mapping[str, list[str]] = field(default_factory=dict)


def read_updates(adapter: PeftModel | str | os.PathLike[str], adapter_name: str = "default") -> Updates:
    """The updates of an adapter on a model, or in a folder that rankwise or PEFT wrote.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file is broken or does not fit the others; the message names it.
    """
    if isinstance(adapter, (str, os.PathLike)):
        file, own = read_adapter(Path(adapter)), {}
    else:
        file, own = read_model_adapter(adapter, adapter_name), adapter_layers(adapter, adapter_name)
    layers: dict[str, Update] = {}
    stacks: dict[str, list[str]] = {}
    for path, tensors in sorted(file.factors.items(), key=_in_order):
        matrices = _matrices(file, path)
        if matrices is None:
            layers[path] = _update(file, path, tensors, own.get(path))
        else:
            stacks[path] = block_names(path, matrices)
            layers |= zip(stacks[path], _unstacked(file, path, tensors, matrices), strict=True)
    return Updates(file.source, file.config, layers, file.others, stacks)


def acting(updates: Updates) -> dict[str, Update]:
    """The updates of the layers that have a rank.

    Raises:
        ValueError: none has.
    """
    layers = {path: update for path, update in updates.layers.items() if update.rank}
    if not layers:
        raise ValueError(f"{updates.source} has rank 0 in all layers, so there is nothing to export.")
    return layers


def write_lora(
    folder: Path,
    updates: Updates,
    layers: Mapping[str, Update],
    dtype: torch.dtype | None = None,
    companions: Iterable[Path] = (),
) -> LoraConfig:
    """Write ``layers`` as a plain LoRA adapter, with all else as in ``updates``, all or nothing.

    Args:
        folder: made if need be; an adapter in it is replaced.
        updates: what ``layers`` were made from.
        layers: updates of ranks from 1; a layer of ``updates`` that is not among them is no target.
        dtype: of the written factors; as they are if None.
        companions: files to copy into the folder.

    Returns:
        The configuration that was written: ``lora_alpha`` equals the rank in every layer.

    Raises:
        OSError: it can't be written; what was there before is whole.
    """
    plain = {path: update for path, update in layers.items() if path not in _in_stacks(updates)}
    stacks = _stacked(updates, layers)
    ranks = {path: update.rank for path, update in plain.items()}
    ranks |= {path: update.rank // len(updates.stacks[path]) for path, update in stacks.items()}
    config = lora_config(updates, ranks)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in updates.others.items()}
    for path, update in plain.items():
        tensors |= named_tensors(path, update, dtype)
    nested = nested_paths(stacks)
    for path, update in stacks.items():
        tensors |= named_tensors(nested[path], update, dtype)
    write_lora_folder(folder, config, tensors, companions)
    return config


def write_lora_folder(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], companions: Iterable[Path] = ()
) -> None:
    """Write a configuration and tensors under PEFT's names as an adapter folder, all or nothing."""

    def write(temporary: Path) -> None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / WEIGHTS_NAME,
                  metadata={"format": "pt"})  # fmt: skip
        config.save_pretrained(temporary)
        for file in companions:
            shutil.copyfile(file, temporary / file.name)

    write_folder(folder, write, owned=OWNED)


def lora_config(updates: Updates, ranks: Mapping[str, int]) -> LoraConfig:
    """A configuration of LoRA layers of these ranks, with rank and alpha equal, so that the scale is 1 everywhere.

    Raises:
        ValueError: one is a matrix of a stack, of which all have one rank in a LoRA file.
    """
    inner = next((path for path in ranks if path in _in_stacks(updates) - updates.stacks.keys()), None)
    if inner is not None:
        raise ValueError(
            f"{updates.source} adapts experts ({inner!r}), for which this format has no place. `save_as_lora` without "
            "`pad` writes what PEFT reads; or export the merged model (`--to merged`), and serve that."
        )
    config, top = updates.config, max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != top}
    plain = [path for path in ranks if path not in updates.stacks]
    every_layer_is_left = len(plain) == len(updates.layers.keys() - _in_stacks(updates))
    every_stack_is_left = len(ranks) - len(plain) == len(updates.stacks)
    return LoraConfig(
        r=top,
        lora_alpha=top,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=config.target_modules if every_layer_is_left else plain,
        target_parameters=config.target_parameters if every_stack_is_left else _in_file_order(updates, ranks),
        exclude_modules=config.exclude_modules if every_layer_is_left else None,
        layers_to_transform=config.layers_to_transform if every_layer_is_left else None,
        layers_pattern=config.layers_pattern if every_layer_is_left else None,
        bias=config.bias,
        fan_in_fan_out=config.fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        extra={name: config.extra[name] for name in _KEPT_EXTRA if name in config.extra},
    )


# Stacks of matrices, such as experts: in a LoRA file all of one have the largest rank of any.


def _in_stacks(updates: Updates) -> set[str]:
    return {name for names in updates.stacks.values() for name in names}


def _in_file_order(updates: Updates, paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that are stacks, each module's in the order in which it holds them."""
    names_of = named_by_targets(updates.config.target_parameters or [])
    owners = by_owner(path for path in paths if path in updates.stacks)
    return [
        path
        for owner, own in owners.items()
        for name in names_of(owner)
        if (path := f"{owner}.{name}") in own
    ]


def _stacked(updates: Updates, layers: Mapping[str, Update]) -> dict[str, Update]:
    """Each stack as a LoRA file has it: A (n * k, d_in), and B (d_out, k * n), with rank for rank."""
    made: dict[str, Update] = {}
    for path in _in_file_order(updates, updates.stacks):
        names = updates.stacks[path]
        rank = max((layers[name].rank for name in names if name in layers), default=0)
        if rank:
            A, B = (updates.layers[names[0]].A, updates.layers[names[0]].B)
            whole_A, whole_B = (
                A.new_zeros(len(names), rank, A.shape[1]),
                B.new_zeros(len(B), rank, len(names)),
            )
            for number, name in enumerate(names):
                if name in layers:
                    whole_A[number, : layers[name].rank] = layers[name].A
                    whole_B[:, : layers[name].rank, number] = layers[name].B
            made[path] = Update(whole_A.flatten(0, 1), whole_B.flatten(1), ParameterAdapters)
    return made


def _matrices(file: AdapterFile, path: str) -> int | None:
    """How many matrices are stacked in the parameter at ``path``; None if it is no parameter's."""
    config = file.config
    if isinstance(config, AdaLoraConfig):
        named = any(f".{path}".endswith(f".{name}") for name in config.target_parameters or ())
        return len(names_of_blocks(file, path)) if named else None
    rank = pattern_value(config.rank_pattern or {}, path, config.r)
    return max(len(file.factors[path]["A"]) // rank, 1) if path in file.nested else None


def _unstacked(file: AdapterFile, path: str, own: Mapping[str, Tensor], matrices: int) -> list[Update]:
    """The update of each matrix of a stack."""
    config, A, B = file.config, own["A"], own["B"]
    if isinstance(config, AdaLoraConfig):
        A = A * (own["E"] * base_scaling(config, path, config.init_r))
        kept = torch.tensor(kept_by_pattern(config).get(path, [True] * len(A))).view(matrices, -1)
        counts = kept.sum(1).tolist()
    else:
        rank = pattern_value(config.rank_pattern or {}, path, config.r)
        A, B = A * base_scaling(config, path, rank), stacked_columns(B, matrices)
        counts = [rank] * matrices
    parts = zip(A.split(counts), B.split(counts, dim=1), strict=True)
    return [Update(one_A, one_B, ParameterAdapters) for one_A, one_B in parts]


def named_tensors(path: str, update: Update, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A layer's factors under PEFT's names and in PEFT's shapes."""
    A, B = update.A.to(dtype or update.A.dtype), update.B.to(dtype or update.B.dtype)
    if update.kernel:
        A, B = A.view(len(A), -1, *update.kernel), B.view(*B.shape, *[1] * len(update.kernel))
    return {
        PREFIX + update.kind.file_name(path, name, adalora=False): each for name, each in (("A", A), ("B", B))
    }


def _in_order(named: tuple[str, Any]) -> list[tuple[int, str]]:
    """Layer 2 before layer 10, which a file has after layer 1."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in named[0].split(".")]


def _update(file: AdapterFile, path: str, own: Mapping[str, Tensor], layer: AdapterLayer | None) -> Update:
    config, kind = file.config, file.kinds[path]
    # Of a convolution: the layer knows it, or plain LoRA's file has it in the shape.
    kernel = getattr(layer, "kernel_size", tuple(own["A"].shape[2:]))
    A, B = own["A"].flatten(1), own["B"].flatten(1)
    if isinstance(config, AdaLoraConfig):
        A = A * (own["E"] * base_scaling(config, path, config.init_r))
        A, B = (A, B) if layer is None else layer.as_lora(A, B)
        return Update(A, B, kind, kernel)
    rank = pattern_value(config.rank_pattern or {}, path, config.r)
    grouped = kernel and B.shape[1] and rank % B.shape[1] == 0
    if A.shape[0] != rank or (B.shape[1] != rank and not grouped):
        raise ValueError(
            f"{file.source}: {path!r} should have rank {rank} by `r` and `rank_pattern` of {CONFIG_NAME}, but its "
            f"factors are {tuple(own['A'].shape)} and {tuple(own['B'].shape)}. One of the files is another adapter's."
        )
    return Update(A * base_scaling(config, path, rank), B, kind, kernel)
