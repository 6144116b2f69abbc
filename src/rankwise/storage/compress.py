"""Cuts an adapter to a chosen size, with the smallest loss that a LoRA of that size can have.

The update B A of a layer is decomposed exactly, without computing the product. Two thin QRs give A' = Q_A R_A and
B = Q_B R_B. An SVD of a rank × rank matrix gives R_B R_A' = U S V'. The update's singular vectors are then Q_B U and
Q_A V. The directions to keep are chosen over all layers at once, by squared singular value per parameter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.config.checks import check_number, check_whole
from rankwise.files.atomic import refuse_existing
from rankwise.files.tensors import check_finite
from rankwise.method.magnitude import largest, power_below
from rankwise.method.truncation import kept_by, parameters_of, ranks_for_budget, ranks_for_share
from rankwise.storage.finite import near
from rankwise.storage.lora_layout import Update
from rankwise.storage.names import OWNED
from rankwise.storage.updates import Updates, read_updates, write_lora

if TYPE_CHECKING:
    from rankwise.model import PeftModel

_OF_TRAINING = ("results.json", "trainer_state.json")
_COMPANIONS = (".json", ".yaml", ".txt", ".jinja", ".model")


@dataclass(frozen=True)
class CompressedLayer:
    """The result for one layer.

    Args:
        path: the layer's path in the model.
        rank: the layer's new rank, at least 0.
        rank_before: the layer's rank before.
        parameters: the number of parameters in its new factors.
        lost: the lost share of the squared norm of its update, from 0 to 1.
    """

    path: str
    rank: int
    rank_before: int
    parameters: int
    lost: float


@dataclass(frozen=True)
class Compression:
    """The size of a compressed adapter, and what the compression loses.

    Args:
        layers: one entry for each layer.
        parameters: the number of parameters in the factors of all layers.
        parameters_before: the same number before the compression.
        lost: the lost share of the squared norm of all updates, from 0 to 1.
    """

    layers: Sequence[CompressedLayer]
    parameters: int
    parameters_before: int
    lost: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self)


class Spectra:
    """The singular values and vectors of all updates of an adapter.

    Args:
        updates: the updates, as `read_updates` returns them.

    Raises:
        ValueError: a layer is a grouped convolution in LoRA's layout or holds NaN or infinite values, or all updates
            are 0.
    """

    def __init__(self, updates: Updates) -> None:
        self.updates = updates
        self.widths = {path: update.width for path, update in updates.layers.items()}
        self._factors: dict[str, Update] = {}
        found: dict[str, Tensor] = {}
        for path, update in updates.layers.items():
            if update.grouped:
                raise ValueError(
                    f"{updates.source}: {path!r} is a grouped convolution, whose LoRA is not a change of its weight, "
                    "so it has no singular values. Train such adapters without that layer."
                )
            for name, factor in (("A", update.A), ("B", update.B)):
                check_finite(updates.source, f"lora_{name} of {path!r}", factor)
            self._factors[path], found[path] = principal(update)
        # Only shares matter. Squares of numbers up to 1 don't overflow.
        unit = max((float(singular.max()) for singular in found.values() if len(singular)), default=0.0)
        if not unit:
            raise ValueError(f"{updates.source} changes nothing: all its updates are 0.")
        self._squares = {path: (singular / unit).square().tolist() for path, singular in found.items()}

    def ranks(
        self, rank: float | None = None, parameters: int | None = None, keep: float | None = None
    ) -> dict[str, int]:
        """The rank of each layer for one of three goals; see `compress_adapter`.

        Raises:
            TypeError, ValueError: not exactly one goal is given, or it is out of range.
        """
        if sum(goal is not None for goal in (rank, parameters, keep)) != 1:
            raise ValueError("Give one of `rank`, `parameters` and `keep`.")
        if keep is not None:
            keep = check_number("keep", keep)
            if not 0 < keep <= 1:
                raise ValueError(
                    f"`keep` must be greater than 0 and at most 1, but is {keep:g}: 0.95 keeps 95 %."
                )
            return ranks_for_share(self._squares, self.widths, keep)
        if rank is not None:
            rank = check_number("rank", rank)
            if rank <= 0:
                raise ValueError(f"`rank` must be greater than 0, but is {rank:g}.")
            budget = math.floor(rank * sum(self.widths.values()))
        else:
            budget = check_whole("parameters", parameters, least=1)
        ranks = ranks_for_budget(self._squares, self.widths, budget)
        if not any(ranks.values()):
            raise ValueError(
                f"{budget:,} parameters are too few for any layer of {self.updates.source}: one rank takes from "
                f"{min(self.widths.values()):,} to {max(self.widths.values()):,}."
            )
        return ranks

    def compression(self, ranks: Mapping[str, int]) -> Compression:
        """Compute the sizes and losses for these ranks."""
        layers = [
            CompressedLayer(
                path, rank, self.updates.layers[path].rank, rank * self.widths[path], self._lost(path, rank)
            )
            for path, rank in ranks.items()
        ]
        whole = sum(map(sum, self._squares.values()))
        return Compression(
            layers=layers,
            parameters=parameters_of(ranks, self.widths),
            parameters_before=sum(update.parameters for update in self.updates.layers.values()),
            lost=max(0.0, 1 - kept_by(self._squares, ranks) / whole),
        )

    def cut(self, ranks: Mapping[str, int]) -> dict[str, Update]:
        """Cut the updates to these ranks. Layers at rank 0 are left out."""
        cut = {}
        for path, rank in ranks.items():
            if rank:
                own = self._factors[path]
                cut[path] = own.cut(rank)
        return cut

    def curve(self) -> list[Compression]:
        """Compute the loss at average ranks from 1 to the present one, in steps of at most a third."""
        most = sum(update.parameters for update in self.updates.layers.values()) / sum(self.widths.values())
        points, rank = [], 1
        while rank < most:
            points.append(float(rank))
            rank += max(1, rank // 3)
        return [self.compression(self.ranks(rank=each)) for each in (*points, max(most, 1.0))]

    def _lost(self, path: str, rank: int) -> float:
        whole = sum(self._squares[path])
        return sum(self._squares[path][rank:]) / whole if whole else 0.0


def compress_adapter(
    save_directory: str | os.PathLike[str],
    adapter: PeftModel | str | os.PathLike[str],
    *,
    rank: float | None = None,
    parameters: int | None = None,
    keep: float | None = None,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Compression:
    """Cut a LoRA or AdaLoRA adapter to a size, and write it as plain LoRA with its own rank for each layer.

    Each layer keeps the best approximation of its update at its new rank. Ranks are chosen over all layers together.
    Biases and modules that were saved in full are written unchanged. Other files that the adapter is used with
    (tokenizer, labels, recipe) are copied. Give exactly one of ``rank``, ``parameters`` and ``keep``.

    Args:
        save_directory: the folder to write. It is created if it does not exist.
        adapter: an adapted model, or an adapter folder that rankwise or PEFT wrote.
        rank: a rank greater than 0. The result has at most as many parameters as LoRA of this rank in all layers of the
            adapter. Layers that the default form has cut to rank 0 do not count.
        parameters: the largest number of parameters in the factors, at least 1.
        keep: the share of the squared norm of all updates to keep, in (0, 1]. It is reached with as few parameters as
            possible.
        adapter_name: the adapter's name in the model.
        dtype: the dtype of the written factors, such as ``torch.bfloat16``. By default they keep their own.
        overwrite: whether to replace the contents of ``save_directory``.

    Returns:
        The rank of every layer, and what was lost.

    Raises:
        FileNotFoundError: the adapter folder does not exist.
        FileExistsError: ``save_directory`` is not empty, and ``overwrite`` is False.
        TypeError, ValueError: the goal or the adapter can't be used.
        OSError: the folder can't be written. Its previous contents are then unchanged.

    Example:
        >>> import tempfile, torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> config = rw.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
        >>> model = rw.get_peft_model(model, config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     compression = rw.compress_adapter(folder, model, rank=1)
        >>> compression.parameters_before, compression.parameters <= 8 + 8 + 8 + 2
        (104, True)
    """
    if not overwrite:
        refuse_existing(Path(save_directory))
    spectra = Spectra(read_updates(adapter, adapter_name))
    ranks = spectra.ranks(rank, parameters, keep)
    own = _companions(Path(adapter)) if isinstance(adapter, (str, os.PathLike)) else []
    write_lora(Path(save_directory), spectra.updates, spectra.cut(ranks), dtype, own)
    return spectra.compression(ranks)


def compression_curve(
    adapter: PeftModel | str | os.PathLike[str], adapter_name: str = "default"
) -> list[Compression]:
    """Compute what `compress_adapter` would lose at sizes up to the present one. Nothing is written.

    Args:
        adapter: an adapted model, or an adapter folder that rankwise or PEFT wrote.
        adapter_name: the adapter's name in the model.

    Returns:
        One entry for each average rank from 1 to the present one, in steps of at most a third.

    Raises:
        FileNotFoundError, ValueError: as in `compress_adapter`.

    Example:
        >>> import torch, rankwise as rw
        >>> config = rw.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        >>> model = rw.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
        >>> [point.parameters for point in rw.compression_curve(model)]
        [16, 32, 48, 64]
    """
    return Spectra(read_updates(adapter, adapter_name)).curve()


def _companions(folder: Path) -> list[Path]:
    """The files in an adapter folder that the adapter is used with, without those that describe its training."""
    return [
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in _COMPANIONS and path.name not in (*OWNED, *_OF_TRAINING)
    ]


def principal(update: Update) -> tuple[Update, Tensor]:
    """Rewrite an update with its singular directions as rows of A and columns of B, the largest first.

    Both factors carry the square roots of the singular values, so that they have similar sizes.

    Args:
        update: the update of a layer, of rank r.

    Returns:
        The rewritten update, in its dtype, with one rank for each nonzero singular value; and the singular values,
        float64, capped at the largest finite number.

    Example:
        >>> from rankwise.adapters import adapters_for
        >>> linear = adapters_for(torch.nn.Linear(3, 2))
        >>> update, singular = principal(Update(torch.eye(2, 3), torch.tensor([[3.0, 0.0], [0.0, 4.0]]), linear))
        >>> singular.tolist(), (update.B @ update.A).abs().tolist()
        ([4.0, 3.0], [[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    """
    # Double precision, because the cut depends on directions that are small relative to the largest.
    A, B = update.A.double(), update.B.double()
    power_A, power_B = (power_below(largest(each, (0, 1))).flatten() for each in (A, B))
    Q_A, R_A = torch.linalg.qr(A.T / power_A)
    Q_B, R_B = torch.linalg.qr(B / power_B)
    U, singular, Vh = torch.linalg.svd(R_B @ R_A.T)
    least = singular[:1].sum() * max(update.A.shape[1], update.B.shape[0]) * torch.finfo(torch.float64).eps
    rank = int((singular > least).sum())
    root = singular[:rank].sqrt() * power_A.sqrt() * power_B.sqrt()
    new_A = near(root[:, None] * (Vh[:rank] @ Q_A.T), update.A.dtype)
    new_B = near(Q_B @ U[:, :rank] * root, update.B.dtype)
    values = (singular[:rank] * power_A * power_B).clamp(max=torch.finfo(torch.float64).max)
    return Update(new_A, new_B, update.kind, update.kernel), values
