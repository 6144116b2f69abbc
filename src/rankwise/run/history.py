"""The history of a run's ranks: the budget and every layer's rank, one record for each cut.

Recording happens in the training loop, so it is cheap: ranks that arrive as a tensor stay on their device. All of them
are copied to the CPU at once when somebody reads the history.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.files.atomic import write_file
from rankwise.files.pointers import refuse_pointer
from rankwise.run.notebook import history_html

# version of the packed tensor: [_LAYOUT, layers, records, then step, budget and ranks of each record]
_LAYOUT = 1


@dataclass
class RankRecord:
    """The ranks after one cut.

    Args:
        step: the optimizer step, 0 for the start.
        budget: the number of ranks that may stay in all layers together.
        ranks: the number of ranks that stay in each layer, in the order of ``RankHistory.layers``.

    Example:
        >>> RankRecord(step=100, budget=16, ranks=[11, 5]).budget
        16
    """

    step: int
    budget: int
    ranks: list[int]


class RankHistory:
    """The budget and every layer's rank over the steps of a run.

    Args:
        layers: the module paths of the adapted layers, in the order in which ranks are recorded.

    Raises:
        ValueError: a layer is named twice.

    Example:
        >>> history = RankHistory(["encoder.query", "encoder.value"])
        >>> history.record(0, 24, [12, 12])
        >>> history.record(100, 16, torch.tensor([11, 5]))
        >>> history.records[-1]
        RankRecord(step=100, budget=16, ranks=[11, 5])
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = list(layers)
        if len(set(self.layers)) != len(self.layers):
            twice = next(name for name in self.layers if self.layers.count(name) > 1)
            raise ValueError(f"A rank history names each layer once, but {twice!r} appears more than once.")
        self._records: list[RankRecord] = []
        self._pending: list[tuple[int, int, torch.Tensor]] = []  # later than all of _records

    def record(self, step: int, budget: int, ranks: Sequence[int] | torch.Tensor) -> None:
        """Add the ranks after a cut.

        If the step or a later one was recorded before, these records are dropped: the run has gone back to an
        earlier checkpoint.

        Args:
            step: the optimizer step, at least 0 (0 is the start).
            budget: the number of ranks that may stay in all layers together, at least 0.
            ranks: the number of ranks that stay in each layer: integers, or an integer tensor of shape (layers,)
                on any device. A tensor is copied on its device, without waiting for it.

        Raises:
            TypeError: the ranks are not whole numbers.
            ValueError: there is not one rank for each layer, or a number is negative.
        """
        shape = tuple(ranks.shape) if isinstance(ranks, torch.Tensor) else (len(ranks),)
        if shape != (len(self.layers),):
            raise ValueError(
                f"Expected ranks of shape ({len(self.layers)},), one for each layer, but got {shape}."
            )
        if step < 0 or budget < 0:
            raise ValueError(f"`step` and `budget` must be at least 0, but are {step} and {budget}.")
        if isinstance(ranks, torch.Tensor):
            if ranks.is_floating_point() or ranks.is_complex() or ranks.dtype is torch.bool:
                raise TypeError(f"Ranks must be whole numbers, but the tensor is of {ranks.dtype}.")
            self._forget_from(step)
            self._pending.append((int(step), int(budget), ranks.detach().to(torch.int32, copy=True)))
            return
        whole = [operator.index(rank) for rank in ranks]
        if any(rank < 0 for rank in whole):
            raise ValueError(f"Ranks must be at least 0, but step {step} has {min(whole)}.")
        self._forget_from(step)
        if self._pending:
            self._pending.append(
                (int(step), int(budget), torch.tensor(whole, dtype=torch.int32, device="cpu"))
            )
        else:
            self._records.append(RankRecord(int(step), int(budget), whole))

    @property
    def records(self) -> list[RankRecord]:
        """All records, in the order of their steps. Reading new ones waits for the device."""
        self._settle()
        return list(self._records)

    def to_json(self) -> str:
        """The history as JSON text with one record per line, so that people and version control can compare it.

        Returns:
            ``{"layers": [...], "records": [{"step": 0, "budget": 24, "ranks": [...]}, ...]}``, with line breaks.
        """
        records = (
            json.dumps({"step": record.step, "budget": record.budget, "ranks": record.ranks})
            for record in self.records
        )
        lines = ",\n".join(records)
        return f'{{"layers": {json.dumps(self.layers)},\n"records": [\n{lines}\n]}}\n'

    @classmethod
    def from_json(cls, text: str, source: str) -> RankHistory:
        """Read the text that :meth:`to_json` returned.

        Args:
            text: the JSON text.
            source: the name of the text's source, for messages.

        Raises:
            ValueError: the text is not a rank history. The message names ``source`` and the fault.

        Example:
            >>> text = '{"layers": ["fc"], "records": [{"step": 0, "budget": 12, "ranks": [12]}]}'
            >>> RankHistory.from_json(text, "rank_history.json").records
            [RankRecord(step=0, budget=12, ranks=[12])]
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} is not a rank history: it is not valid JSON ({error}).") from error
        if not isinstance(data, dict) or not {"layers", "records"} <= data.keys():
            raise ValueError(
                f'{source} is not a rank history: it must be an object with "layers" and "records".'
            )
        layers, records = data["layers"], data["records"]
        if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
            raise ValueError(f'{source} is not a rank history: "layers" must be a list of module paths.')
        if not isinstance(records, list):
            raise ValueError(f'{source} is not a rank history: "records" must be a list.')
        try:
            history = cls(layers)
            history._records = [_checked_record(record, len(layers)) for record in records]
        except ValueError as error:
            raise ValueError(f"{source} is not a rank history: {error}") from error
        history._check_order(source)
        return history

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history to a JSON file, atomically: a killed process leaves the old file or the new one.

        Args:
            path: the file to write. It is replaced if it exists.

        Raises:
            OSError: the file can't be written. The old file has not changed then.
        """
        write_file(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankHistory:
        """Read a file that :meth:`save` wrote.

        Args:
            path: the path of the file.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a rank history.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a rank history: it is not UTF-8 text ({error}).") from error
        refuse_pointer(Path(path))
        return cls.from_json(text, str(path))

    def to_tensor(self) -> torch.Tensor:
        """Pack the records, without the layers' names, into one int64 tensor on the CPU for a state dictionary.

        Returns:
            A tensor of shape ``(3 + records * (2 + layers),)``: the version, the number of layers, the number of
            records, and for each record its step, its budget and its ranks.
        """
        flat = [_LAYOUT, len(self.layers), len(self.records)]
        for record in self._records:
            flat += [record.step, record.budget, *record.ranks]
        return torch.tensor(flat, dtype=torch.int64, device="cpu")

    @classmethod
    def from_tensor(cls, layers: Sequence[str], tensor: torch.Tensor) -> RankHistory:
        """Unpack the tensor that :meth:`to_tensor` returned.

        Args:
            layers: the module paths of the adapted layers.
            tensor: the packed records, 1-D, int64.

        Raises:
            ValueError: the tensor is not a packed history, or its number of layers differs.

        Example:
            >>> history = RankHistory(["fc"])
            >>> history.record(0, 12, [12])
            >>> RankHistory.from_tensor(["fc"], history.to_tensor()) == history
            True
        """
        history = cls(layers)
        if tensor.dtype is not torch.int64 or tensor.dim() != 1 or tensor.numel() < 3:
            raise ValueError(
                f"A packed rank history is a 1-D int64 tensor of 3 or more values, but this is "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}."
            )
        flat: list[int] = tensor.tolist()
        layout, width, count = flat[:3]
        if layout != _LAYOUT:
            raise ValueError(f"The packed rank history has layout {layout}; this version reads {_LAYOUT}.")
        if width != len(history.layers):
            raise ValueError(
                f"The packed rank history has {width} layers, but {len(history.layers)} are named."
            )
        stride = 2 + width
        if count < 0 or len(flat) != 3 + count * stride:
            raise ValueError(
                f"The packed rank history is cut off: it announces {count} records of {stride} values, but has "
                f"{len(flat) - 3} values."
            )
        if min(flat) < 0:
            raise ValueError(f"The packed rank history holds {min(flat)}, but nothing in it is below 0.")
        rows = (flat[start : start + stride] for start in range(3, len(flat), stride))
        history._records = [RankRecord(row[0], row[1], row[2:]) for row in rows]
        history._check_order("The packed rank history")
        return history

    def __len__(self) -> int:
        return len(self._records) + len(self._pending)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, RankHistory):
            return NotImplemented
        return self.layers == other.layers and self.records == other.records

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RankHistory({len(self.layers)} layers, {len(self)} records)"

    def _repr_html_(self) -> str:
        """The history as HTML, for notebooks."""
        return history_html(self.layers, self.records)

    def _forget_from(self, step: int) -> None:
        while self._pending and self._pending[-1][0] >= step:
            self._pending.pop()
        while not self._pending and self._records and self._records[-1].step >= step:
            self._records.pop()

    def _settle(self) -> None:
        """Copy the ranks that are still on a device to the CPU, in one copy."""
        if not self._pending:
            return
        device = self._pending[-1][2].device
        ranks = torch.stack([tensor.to(device) for _, _, tensor in self._pending]).tolist()
        self._records += [
            RankRecord(step, budget, row) for (step, budget, _), row in zip(self._pending, ranks, strict=True)
        ]
        self._pending.clear()

    def _check_order(self, source: str) -> None:
        for before, after in zip(self._records, self._records[1:], strict=False):
            if after.step <= before.step:
                raise ValueError(
                    f"{source} is not a rank history: its steps must rise, but {after.step} follows "
                    f"{before.step}."
                )


def _checked_record(record: Any, width: int) -> RankRecord:
    if not isinstance(record, dict) or not {"step", "budget", "ranks"} <= record.keys():
        raise ValueError(
            f'each record must be an object with "step", "budget" and "ranks", but one is {record!r:.80}.'
        )
    step, budget, ranks = record["step"], record["budget"], record["ranks"]
    if not isinstance(ranks, list) or len(ranks) != width:
        raise ValueError(f"step {step!r:.20} must have {width} ranks, one for each layer.")
    values = [step, budget, *ranks]
    # This order of the checks is fast: there can be millions of records.
    if set(map(type, values)) != {int} or min(values) < 0 or max(values) >= 2**53:
        value = next(each for each in values if type(each) is not int or not 0 <= each < 2**53)
        raise ValueError(f"step {step!r:.20} has {value!r:.20} where a whole number of at least 0 belongs.")
    return RankRecord(step, budget, ranks)
