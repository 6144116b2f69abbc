"""The rank summary: a table that fits a terminal, and the same facts as data."""

from __future__ import annotations

import json
import math

import pytest

from rankwise.run.summary import LayerRank, RankSummary, rank_bar, shorten


def summary(prefix: str = "encoder.layer", init_r: int = 12, count: int = 12) -> RankSummary:
    layers = [
        LayerRank(
            f"{prefix}.{n}.attention.self.query", n * init_r // max(1, count - 1), init_r, 0.1 * n, 1000 * n
        )
        for n in range(count)
    ]
    return RankSummary(layers, budget=init_r * count)


def test_sums_are_over_all_layers() -> None:
    table = summary()
    assert table.total_rank == sum(layer.rank for layer in table.layers)
    assert table.parameters == 1000 * sum(range(12))


@pytest.mark.parametrize("init_r", [1, 8, 12, 24, 25, 64, 512])
@pytest.mark.parametrize("prefix", ["h", "encoder.layer", "base." * 30 + "model.language_model.layers"])
def test_the_table_is_aligned_and_fits_100_columns(prefix: str, init_r: int) -> None:
    lines = str(summary(prefix, init_r)).splitlines()
    assert len(lines) == 1 + 12 + 1
    assert len({len(line) for line in lines[:-1]}) == 1
    assert max(map(len, lines)) <= 100


def test_long_paths_keep_their_number_and_kind() -> None:
    lines = str(summary("base." * 30 + "model.language_model.layers")).splitlines()
    assert all(f"layers.{n}.attention.self.query" in line for n, line in enumerate(lines[1:-1]))


def test_rank_0_is_counted_and_its_bar_is_empty() -> None:
    table = summary()
    assert "1 layer at rank 0" in str(table)
    assert "░" * 12 in str(table).splitlines()[1]
    assert "█" not in str(table).splitlines()[1]


def test_the_importance_column_is_left_out_if_none_is_known() -> None:
    unknown = RankSummary([LayerRank("fc", 4, 8, math.nan, 64)], budget=8)
    assert "importance" not in str(unknown)
    mixed = RankSummary([*unknown.layers, LayerRank("fc2", 4, 8, 0.5, 64)], budget=16)
    assert " - " in str(mixed).splitlines()[1]


def test_the_data_is_json_even_if_importance_is_unknown() -> None:
    data = RankSummary([LayerRank("fc", 4, 8, math.nan, 64)], budget=8).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == {
        "budget": 8,
        "total_rank": 4,
        "parameters": 64,
        "layers": [{"path": "fc", "rank": 4, "init_r": 8, "importance": None, "parameters": 64}],
    }


def test_an_empty_summary_prints() -> None:
    assert "0 layers: rank 0 of 0" in str(RankSummary([], budget=0))


@pytest.mark.parametrize("init_r", [24, 25, 64, 300])
def test_bars_distinguish_none_some_and_all(init_r: int) -> None:
    bars = [rank_bar(rank, init_r, largest=init_r) for rank in range(init_r + 1)]
    assert "█" not in bars[0] and "█" in bars[1]
    assert "░" in bars[-2] and "░" not in bars[-1]
    assert {len(bar) for bar in bars} == {24}
    assert [bar.count("█") for bar in bars] == sorted(bar.count("█") for bar in bars)


@pytest.mark.parametrize("width", [1, 2, 3, 10, 47])
def test_shortening_keeps_to_the_width(width: int) -> None:
    assert len(shorten("model.language_model.layers.11.self_attn.q_proj", width)) == min(width, 47)


def test_in_a_notebook_every_layer_has_a_row_and_names_are_no_markup() -> None:
    table = summary("encoder.<b>layer", count=3)
    page = table._repr_html_()
    assert page.count("<tr>") == 1 + 3 and table.totals() in page
    assert "<b>" not in page and "encoder.&lt;b&gt;layer.2" in page
    assert "importance" in page and "12 of 12" in page


def test_bars_shrink_before_paths_are_cut() -> None:
    table = RankSummary([LayerRank("a" * 50, 12, 24, 0.5, 64)], budget=24)
    assert "a" * 50 in table.to_lines(107)[1] and table.to_lines(107)[1].count("█") == 12
    assert "a" * 50 in table.to_lines(95)[1] and table.to_lines(95)[1].count("█") < 12
    assert max(map(len, table.to_lines(60)[:-1])) <= 60
