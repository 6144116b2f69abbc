"""Heat maps and histories as image files: complete, of sensible size, for models of every shape."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from rankwise.report.plots import _groups, _thinned, rank_heatmap, rank_history_plot
from rankwise.run.history import RankHistory
from rankwise.run.summary import LayerRank, RankSummary

WHISPER = [
    *(f"model.encoder.layers.{n}.{kind}" for n in range(2) for kind in ("self_attn.q_proj", "fc1")),
    *(
        f"model.decoder.layers.{n}.{kind}"
        for n in range(2)
        for kind in ("self_attn.q_proj", "encoder_attn.q_proj")
    ),
    "proj_out",
]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.rstrip().endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def summary(paths: list[str]) -> RankSummary:
    return RankSummary([LayerRank(path, n % 5, 4, 0.1, 64) for n, path in enumerate(paths)], 4 * len(paths))


def history(layers: list[str], records: int = 5) -> RankHistory:
    filled = RankHistory(layers)
    for step in range(records):
        filled.record(step * 10, len(layers) * (records - step), [max(0, 4 - step)] * len(layers))
    return filled


@pytest.mark.parametrize(
    "paths",
    [
        WHISPER,
        ["fc1"],
        ["fc1", "a.very.long.path.without.any.number.in.it.that.goes.on.and.on.proj"],
        [f"h.{n}.q" for n in range(40)],
        [f"layers.0.experts.{n}.w1" for n in range(30)],
    ],
)
def test_a_heat_map_is_written_at_a_sensible_size(paths: list[str], tmp_path: Path) -> None:
    rank_heatmap(summary(paths), tmp_path / "ranks.png")
    width, height = png_size(tmp_path / "ranks.png")
    assert 400 < width < 4000 and 300 < height < 4000


def test_many_stacks_go_on_below_each_other(tmp_path: Path) -> None:
    paths = [f"stage{stage}.{n}.conv{k}" for stage in "abcdefgh" for n in range(3) for k in range(6)]
    rank_heatmap(summary(paths), tmp_path / "ranks.png")
    assert png_size(tmp_path / "ranks.png")[0] < 3000


def test_plain_ranks_can_be_drawn(tmp_path: Path) -> None:
    rank_heatmap({"h.0.q": 3, "h.0.v": 0}, tmp_path / "ranks.svg", title="My ranks")
    text = (tmp_path / "ranks.svg").read_text()
    assert "<svg" in text


@pytest.mark.parametrize("layers", [WHISPER, ["fc1"]])
@pytest.mark.parametrize("records", [1, 5])
def test_a_history_is_drawn(layers: list[str], records: int, tmp_path: Path) -> None:
    rank_history_plot(history(layers, records), tmp_path / "history.png")
    width, height = png_size(tmp_path / "history.png")
    assert 1000 < width < 2500 and 400 < height < 3000


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapted layers"):
        rank_heatmap({}, tmp_path / "ranks.png")
    with pytest.raises(ValueError, match="empty"):
        rank_history_plot(RankHistory(["fc"]), tmp_path / "history.png")
    assert not list(tmp_path.iterdir())


def test_an_unknown_file_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        rank_heatmap({"h.0.q": 3}, tmp_path / "ranks.nonsense")


def test_each_layer_is_in_one_group_in_the_order_of_blocks() -> None:
    layers = [*reversed(WHISPER), *(f"model.encoder.layers.{n}.fc1" for n in (11, 9))]
    groups = _groups(layers)
    assert sorted(index for _, members in groups for index in members) == list(range(len(layers)))
    names = dict(groups)
    assert [layers[index] for index in names["encoder · fc1"]] == [
        f"model.encoder.layers.{n}.fc1" for n in (0, 1, 9, 11)
    ]
    assert groups[-1][0] == "proj_out"


def test_a_long_history_is_thinned_but_keeps_its_ends() -> None:
    records = history(["fc"], 5000).records
    thin = _thinned(records)
    assert len(thin) == 1500 and thin[0] == records[0] and thin[-1] == records[-1]
    assert len({record.step for record in thin}) == 1500


def test_a_picture_on_a_full_disk_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "ranks.png"
    rank_heatmap({"layers.0.q_proj": 4}, path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="Could not save to .*ranks.png: the disk is full"):
        rank_heatmap({"layers.0.q_proj": 2}, path)
    assert path.read_bytes() == before
