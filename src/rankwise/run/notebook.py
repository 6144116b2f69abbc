"""Summaries and histories as HTML tables for notebooks, in the notebook's own light or dark colours."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

_MOMENTS = 12  # columns of a history, at most
_BOX = "max-height:420px;overflow:auto"  # the table of a model with hundreds of layers scrolls
_HUE = "33,145,140"  # drawn transparently, so that text stays readable on it


class _Layer(Protocol):
    @property
    def path(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def init_r(self) -> int: ...
    @property
    def importance(self) -> float: ...
    @property
    def parameters(self) -> int: ...


class _Record(Protocol):
    step: int
    budget: int
    ranks: list[int]


def summary_html(layers: Sequence[_Layer], caption: str) -> str:
    """A table with one row per layer: rank with a bar, importance if any is known, parameters.

    Example:
        >>> from rankwise.run.summary import LayerRank
        >>> page = summary_html([LayerRank("fc1", 1, 4, 0.5, 16)], "1 layer")
        >>> "fc1" in page and "1 of 4" in page
        True
    """
    known = any(math.isfinite(layer.importance) for layer in layers)
    largest = max((layer.init_r for layer in layers), default=0) or 1
    head = ["layer", "rank", *(["importance"] if known else []), "parameters"]
    rows = []
    for layer in layers:
        share = f"{100 * layer.rank / largest:.3g}%"
        bar = f"background:linear-gradient(90deg,rgba({_HUE},.45) {share},transparent {share})"
        importance = f"{layer.importance:.3g}" if math.isfinite(layer.importance) else "-"
        cells = [_cell(f"{layer.rank} of {layer.init_r}", f"{bar};min-width:9em")]
        cells += [_cell(importance)] if known else []
        rows.append(_row(layer.path, [*cells, _cell(f"{layer.parameters:,}")]))
    return _table(head, rows, caption)


def history_html(layers: Sequence[str], records: Sequence[_Record]) -> str:
    """A table with one row per layer and one column for each of at most 12 records; larger ranks are darker.

    Example:
        >>> from rankwise.run.history import RankRecord
        >>> page = history_html(["fc1", "fc2"], [RankRecord(0, 8, [4, 4]), RankRecord(10, 4, [4, 0])])
        >>> "step 10" in page
        True
    """
    if not records:
        return _table(["layer"], [_row(path, []) for path in layers], "nothing is recorded yet")
    last = len(records) - 1
    count = min(len(records), _MOMENTS)
    shown = [records[round(at * last / max(1, count - 1))] for at in range(count)]
    largest = max(max(record.ranks, default=0) for record in records) or 1
    rows = [_row("budget", [_cell(f"{record.budget:,}") for record in shown])]
    for index, path in enumerate(layers):
        ranks = (record.ranks[index] for record in shown)
        cells = (_cell(f"{rank}", f"background:rgba({_HUE},{0.6 * rank / largest:.2f})") for rank in ranks)
        rows.append(_row(path, list(cells)))
    head = ["layer", *(f"step {record.step:,}" for record in shown)]
    return _table(head, rows, f"{len(layers):,} layers, {len(records):,} records")


def _table(head: Sequence[str], rows: Iterable[str], caption: str) -> str:
    titles = "".join(
        f'<th scope="col" style="text-align:{_side(at)}">{name}</th>' for at, name in enumerate(head)
    )
    body = "".join(rows)
    return (
        f'<div style="{_BOX}"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<div>{html.escape(caption)}</div>"
    )


def _side(column: int) -> str:
    return "right" if column else "left"


def _row(path: str, cells: Iterable[str]) -> str:
    return f'<tr><th scope="row" style="text-align:left">{html.escape(path)}</th>{"".join(cells)}</tr>'


def _cell(text: str, style: str = "") -> str:
    return f'<td style="text-align:right;padding:2px 8px;{style}">{text}</td>'
