"""An adapter cut to a size of your choice, with the least loss that LoRA of that size can have.

The update B A of a layer is decomposed exactly without forming it. With A' = Q_A R_A and B = Q_B R_B, two thin QRs, and
R_B R_A' = U S V', an SVD of rank × rank numbers, its singular vectors are Q_B U and Q_A V. Which directions stay
is decided over all layers at once, by square per parameter.
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
    """What became of one layer.

    Args:
        path: its path in the model.
        rank: its rank, 0 included.
        rank_before: its rank before.
        parameters: numbers in its factors.
        lost: the share of its update's squared norm that is gone, from 0 to 1.
    """

    path: str
    rank: int
    rank_before: int
    parameters: int
    lost: float


@dataclass(frozen=True)
class Compression:
    """What an adapter is cut to, and what that loses.

    Args:
        layers: one entry for each layer.
        parameters: numbers in the factors of all layers.
        parameters_before: the same, before.
        lost: the share of the squared norm of all updates that is gone, from 0 to 1.
    """

    layers: Sequence[CompressedLayer]
    parameters: int
    parameters_before: int
    lost: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)


class Spectra:
    """The singular values and vectors of all updates of an adapter.

    Args:
        updates: as `read_updates` gives them.

    Raises:
        ValueError: a layer is a grouped convolution in LoRA's layout or holds NaN or infinite values, or no update has
            anything in it.
    """

    def __init__(self, updates: Updates) -> None:
        self.updates = updates
        self.widths = {path: update.width for path, update in updates.layers.items()}
        self._factors: dict[str, Update] = {}
        found: dict[str, Tensor] = {}
        for path, update in updates.layers.items():
            if update.grouped:
                raise ValueError(
                    f"{updates.source}: {path!r} is a grouped convolution, whose LoRA is no change of its weight, so "
                    "that it has no singular values. Train such adapters without that layer."
                )
            for name, factor in (("A", update.A), ("B", update.B)):
                check_finite(updates.source, f"lora_{name} of {path!r}", factor)
            self._factors[path], found[path] = principal(update)
        # Only shares count, and squares of numbers of at most 1 don't overflow.
        unit = max((float(singular.max()) for singular in found.values() if len(singular)), default=0.0)
        if not unit:
            raise ValueError(f"{updates.source} changes nothing: all its updates are 0.")
        self._squares = {path: (singular / unit).square().tolist() for path, singular in found.items()}

    def ranks(
        self, rank: float | None = None, parameters: int | None = None, keep: float | None = None
    ) -> dict[str, int]:
        """The rank of each layer for one of three goals; see `compress_adapter`.

        Raises:
            TypeError, ValueError: not just one goal, or one out of range.
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
        """What these ranks lose."""
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
        """The updates of the layers that keep a rank, cut to it."""
        cut = {}
        for path, rank in ranks.items():
            if rank:
                own = self._factors[path]
                cut[path] = own.cut(rank)
        return cut

    def curve(self) -> list[Compression]:
        """What average ranks from 1 to the present one would lose, in steps of at most a third."""
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
    """Cut a LoRA or AdaLoRA adapter to a size, and write it as plain LoRA with a rank for each layer.

    What stays of each layer is the best approximation of its rank, and the ranks are chosen over all layers together.
    Biases and modules saved whole are written as they are, and what lies beside the adapter to use it with (tokenizer,
    labels, recipe) goes along. Give one of ``rank``, ``parameters`` and ``keep``.

    Args:
        save_directory: the folder to write; made if need be.
        adapter: an adapted model, or an adapter folder that rankwise or PEFT wrote.
        rank: as many parameters as LoRA of this rank has in all layers of the adapter, greater than 0. A layer that has
            ended at rank 0 in the default form is none of them.
        parameters: at most so many numbers in the factors.
        keep: the share of the squared norm of all updates to keep, in (0, 1], with as few parameters as that takes.
        adapter_name: which adapter of the model.
        dtype: of the written factors, such as ``torch.bfloat16``; as they are if None.
        overwrite: replace what is in ``save_directory``.

    Returns:
        The rank of every layer and what is lost.

    Raises:
        FileNotFoundError: there is no such adapter folder.
        FileExistsError: ``save_directory`` has something in it, and ``overwrite`` is False.
        TypeError, ValueError: the goal or the adapter can't be used.
        OSError: it can't be written; what was there before is whole.

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
    """What `compress_adapter` would lose at sizes up to the present one; nothing is written.

    Args:
        adapter: an adapted model, or an adapter folder that rankwise or PEFT wrote.
        adapter_name: which adapter of the model.

    Raises:
        FileNotFoundError, ValueError: as `compress_adapter`.
    """
    return Spectra(read_updates(adapter, adapter_name)).curve()


def _companions(folder: Path) -> list[Path]:
    """The files beside an adapter that it is used with, and not those that tell of its training."""
    return [
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in _COMPANIONS and path.name not in (*OWNED, *_OF_TRAINING)
    ]


def principal(update: Update) -> tuple[Update, Tensor]:
    """The same update with its singular directions as rows of A and columns of B, the largest first.

    Both factors carry the square root of the singular values, so that neither is much larger than the other.

    Args:
        update: of rank r.

    Returns:
        The update, in its dtype, of as many directions as have anything in them, and their singular values, float64, at
        most its largest number.

    Example:
        >>> from rankwise.adapters import adapters_for
        >>> linear = adapters_for(torch.nn.Linear(3, 2))
        >>> update, singular = principal(Update(torch.eye(2, 3), torch.tensor([[3.0, 0.0], [0.0, 4.0]]), linear))
        >>> singular.tolist(), (update.B @ update.A).abs().tolist()
        ([4.0, 3.0], [[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    """
    # In double precision, as what is small beside the largest direction is what the cut is about.
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
