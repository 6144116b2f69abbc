"""Budgets and ranks drawn with characters: correct, aligned, within the terminal, readable without colours."""

from __future__ import annotations

import io
import math

import pytest

pytest.importorskip("rich")

from rich.console import Console

from rankwise.method.schedule import BudgetSchedule
from rankwise.report.terminal import budget_chart, rank_picture, rank_table
from rankwise.run.summary import LayerRank, RankSummary

BERT = (
    "attention.self.query",
    "attention.self.key",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
WHISPER = [f"{kind}.{part}" for kind in ("self_attn", "encoder_attn") for part in ("q_proj", "out_proj")]


def shown(part: object, width: int = 80, colour: bool = False) -> list[str]:
    console = Console(
        width=width, file=io.StringIO(), force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def summary(paths: list[str], ranks: list[int], init_r: int = 12) -> RankSummary:
    rows = [LayerRank(path, rank, init_r, 0.5, 64 * rank) for path, rank in zip(paths, ranks, strict=True)]
    return RankSummary(rows, init_r * len(rows))


def bert(count: int = 12) -> RankSummary:
    paths = [f"bert.encoder.layer.{n}.{kind}" for n in range(count) for kind in BERT]
    return summary(paths, [index % 13 for index in range(len(paths))])


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize(
    "schedule",
    [
        BudgetSchedule(200, 500, 3000, 10),
        BudgetSchedule(0, 0, 1),
        BudgetSchedule(0, 0, 20),
        BudgetSchedule(2000, 10000, 13500),
    ],
)
@pytest.mark.parametrize(("initial", "target"), [(144, 96), (144, 144), (12, 0), (26_880, 1)])
def test_the_chart_fits_and_tells_the_budget(
    schedule: BudgetSchedule, initial: int, target: int, width: int
) -> None:
    lines = shown(budget_chart(schedule, initial, target), width)
    assert max(map(len, lines)) <= width
    assert f"{initial:,}" in lines[0]
    if target:
        assert any(f"{target:,}│" in line for line in lines) or target == 1 or target == initial
    assert any("pruning" in line for line in lines)


def test_the_chart_falls_from_the_initial_budget_to_the_target() -> None:
    lines = shown(budget_chart(BudgetSchedule(30, 30, 100), initial=100, target=50))
    heights = [
        sum(" ▁▂▃▄▅▆▇█".index(line[column]) for line in lines[:6]) for column in range(len("budget") + 2, 80)
        if all(len(line) > column for line in lines[:6])
    ]  # fmt: skip
    assert heights[0] == 48 and heights[-1] == 24
    assert heights == sorted(heights, reverse=True)


def test_the_chart_marks_each_phase_with_its_steps() -> None:
    text = "\n".join(shown(budget_chart(BudgetSchedule(200, 500, 3000, 10), initial=144, target=96)))
    for said in (
        "warm-up  steps 1 to 200: 144",
        "pruning  steps 201 to 2,500: 144 → 96, chosen again every 10 steps",
        "final    steps 2,501 to 3,000: 96",
    ):
        assert said in text
    assert "─ pruning ─" in text and "─ final ─" in text


def test_phases_without_steps_are_not_mentioned() -> None:
    text = "\n".join(shown(budget_chart(BudgetSchedule(0, 0, 20), initial=144, target=96)))
    assert "warm-up" not in text and "final" not in text


def test_the_table_tells_every_layer_and_the_sums() -> None:
    table = bert()
    lines = shown(rank_table(table), 100)
    for layer in table.layers:
        [line] = [line for line in lines if line.startswith(f"{layer.path} ")]
        assert f"{layer.rank}/12" in line and line.count("█") == layer.rank
    assert table.totals() in lines[-1]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_long_paths_are_cut_in_the_middle(width: int) -> None:
    paths = [f"base.model.language_model.decoder.layers.{n}.attention.self.query" for n in range(3)]
    lines = shown(rank_table(summary(paths, [0, 40, 64], init_r=64)), width)
    assert max(map(len, lines)) <= width
    for number in range(3):
        assert f".{number}.attention.self.query"[-(width - 50) :] in lines[number + 1]


def test_the_table_has_no_importance_column_if_none_is_known() -> None:
    unknown = RankSummary([LayerRank("fc", 4, 8, math.nan, 64)], budget=8)
    assert "importance" not in "".join(shown(rank_table(unknown)))


@pytest.mark.parametrize("colour", [False, True])
def test_the_picture_has_a_row_for_each_block_and_every_number(colour: bool) -> None:
    table = bert()
    lines = shown(rank_picture(table), 80, colour)
    start = next(at for at, line in enumerate(lines) if "bert.encoder.layer" in line)
    headings = " ".join(lines[start : start + 3])
    assert all(word in headings for word in ("query", "key", "attention", "output"))
    if not colour:
        rows = [line.replace("░", " ").split() for line in lines if line.strip()[:1].isdigit()]
        assert [int(row[0]) for row in rows] == list(range(12))
        assert [int(cell) for row in rows for cell in row[1:]] == [layer.rank for layer in table.layers]


def test_rank_0_is_shaded_and_nothing_else_is() -> None:
    lines = shown(rank_picture(summary(["h.0.q", "h.0.v"], [0, 10])))
    [row] = [line for line in lines if line.startswith("0")]
    assert row.split() == ["0", "░0░░", "10"]
    coloured = "".join(shown(rank_picture(summary(["h.0.q"], [12])), colour=True))
    assert "48;2;253;231;37" in coloured  # the last colour of the scale, as the number's background


@pytest.mark.parametrize("width", [24, 40, 80])
def test_a_wide_stack_is_cut_into_pieces_that_fit(width: int) -> None:
    paths = [f"model.layers.{n}.experts.{e}.w{w}" for n in range(3) for e in range(16) for w in (1, 2)]
    lines = shown(rank_picture(summary(paths, [7] * len(paths))), width)
    legend = next(at for at, line in enumerate(lines) if line.startswith("rank"))
    rows = [line.split()[1:] for line in lines[:legend] if line[:1].isdigit()]
    assert sum(len(row) for row in rows) == len(paths)
    assert all(set(row) == {"7"} for row in rows)


def test_stacks_and_loose_layers_each_have_a_picture() -> None:
    paths = [f"model.encoder.layers.0.{kind}" for kind in WHISPER[:2]]
    paths += [f"model.decoder.layers.0.{kind}" for kind in WHISPER] + ["proj_out"]
    lines = shown(rank_picture(summary(paths, [3] * len(paths))))
    titles = [
        line for line in lines if line in ("model.encoder.layers", "model.decoder.layers", "other layers")
    ]
    assert titles == ["model.encoder.layers", "model.decoder.layers", "other layers"]
    assert any(line.startswith("proj_out") for line in lines)


def test_an_empty_summary_draws_nothing_and_does_not_fail() -> None:
    assert shown(rank_picture(RankSummary([], 0))) == []
    assert "0 layers" in shown(rank_table(RankSummary([], 0)))[-1]


def test_paths_with_brackets_are_shown_as_they_are() -> None:
    text = "\n".join(shown(rank_table(summary(["[red]layer[/red]"], [3]))))
    assert "[red]layer[/red]" in text
