"""The rank history: cheap to record, exact to store, and correct if a run goes back to an earlier step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from rankwise.run.history import RankHistory, RankRecord

LAYERS = ["encoder.layer.0.query", "encoder.layer.0.value", "encoder.layer.1.query"]


def filled() -> RankHistory:
    history = RankHistory(LAYERS)
    history.record(0, 36, [12, 12, 12])
    history.record(100, 30, torch.tensor([12, 10, 8]))
    history.record(110, 24, [12, 8, 4])
    history.record(120, 16, torch.tensor([12, 4, 0], dtype=torch.int32))
    return history


def test_records_come_back_in_order_whether_given_as_lists_or_tensors() -> None:
    assert filled().records == [
        RankRecord(0, 36, [12, 12, 12]),
        RankRecord(100, 30, [12, 10, 8]),
        RankRecord(110, 24, [12, 8, 4]),
        RankRecord(120, 16, [12, 4, 0]),
    ]
    assert all(type(rank) is int for record in filled().records for rank in record.ranks)


def test_a_recorded_tensor_is_a_copy() -> None:
    history = RankHistory(["fc"])
    ranks = torch.tensor([5])
    history.record(1, 8, ranks)
    ranks.zero_()
    assert history.records[0].ranks == [5]


def test_recording_a_tensor_reads_none_of_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    history = RankHistory(["fc"])
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "cpu", "numpy", "__int__", "__bool__", "__index__", "__iter__"):
            patch.setattr(
                torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device")
            )
        history.record(1, 8, torch.tensor([5]))
        history.record(2, 7, torch.tensor([4]))
        assert len(history) == 2
    assert [record.ranks for record in history.records] == [[5], [4]]


@pytest.mark.parametrize("read_between", [False, True])
@pytest.mark.parametrize(
    ("step", "kept"), [(120, [0, 100, 110]), (105, [0, 100]), (0, []), (121, [0, 100, 110, 120])]
)
def test_going_back_drops_later_records(step: int, kept: list[int], read_between: bool) -> None:
    for ranks in ([1, 2, 3], torch.tensor([1, 2, 3])):
        history = filled()
        if read_between:
            assert len(history.records) == 4
        history.record(step, 6, ranks)
        assert [record.step for record in history.records] == [*kept, step]
        assert history.records[-1].ranks == [1, 2, 3]


@pytest.mark.parametrize("layers", [[], ["fc"], LAYERS])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_json_and_tensor_round_trips_are_exact(layers: list[str], count: int) -> None:
    history = RankHistory(layers)
    for step in range(count):
        history.record(step * 10, 100 - step, [step] * len(layers))
    assert RankHistory.from_json(history.to_json(), "here") == history
    packed = history.to_tensor()
    assert packed.dtype is torch.int64 and packed.dim() == 1
    assert RankHistory.from_tensor(layers, packed) == history


def test_json_has_the_documented_form() -> None:
    data = json.loads(filled().to_json())
    assert data["layers"] == LAYERS
    assert data["records"][1] == {"step": 100, "budget": 30, "ranks": [12, 10, 8]}


def test_a_file_round_trips_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "rank_history.json"
    RankHistory(["old"]).save(path)
    filled().save(path)
    assert RankHistory.load(path) == filled()
    assert os.listdir(tmp_path) == ["rank_history.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rank_history.json"
    filled().save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        RankHistory(["new"]).save(path)
    assert RankHistory.load(path) == filled()
    assert os.listdir(tmp_path) == ["rank_history.json"]


RECORD = '{"step": 1, "budget": 3, "ranks": [3]}'


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", '"layers" and "records"'),
        ('{"layers": []}', '"layers" and "records"'),
        ('{"layers": "fc", "records": []}', '"layers" must be a list'),
        ('{"layers": [1], "records": []}', '"layers" must be a list'),
        ('{"layers": ["fc", "fc"], "records": []}', "appears more than once"),
        ('{"layers": ["fc"], "records": {}}', '"records" must be a list'),
        ('{"layers": ["fc"], "records": [3]}', "each record must be"),
        ('{"layers": ["fc"], "records": [{"step": 1, "budget": 3, "ranks": [3, 4]}]}', "must have 1 ranks"),
        ('{"layers": ["fc"], "records": [{"step": 1, "budget": 3, "ranks": [-1]}]}', "-1"),
        ('{"layers": ["fc"], "records": [{"step": 1, "budget": 3.5, "ranks": [1]}]}', "3.5"),
        ('{"layers": ["fc"], "records": [{"step": true, "budget": 3, "ranks": [1]}]}', "True"),
        (f'{{"layers": ["fc"], "records": [{RECORD}, {RECORD}]}}', "steps must rise"),
    ],
)
def test_malformed_json_is_refused_by_name(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong) as caught:
        RankHistory.from_json(text, "adapter/rank_history.json")
    assert "adapter/rank_history.json" in str(caught.value)


def test_a_binary_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "rank_history.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"rank_history\.json is not a rank history"):
        RankHistory.load(tmp_path / "rank_history.json")


@pytest.mark.parametrize(
    ("tensor", "wrong"),
    [
        (torch.zeros(3), "int64"),
        (torch.tensor([1, 3], dtype=torch.int64), "3 or more"),
        (torch.tensor([9, 3, 0]), "layout 9"),
        (torch.tensor([1, 2, 0]), "2 layers, but 3"),
        (torch.tensor([1, 3, 1, 0, 9, 3, 3]), "cut off"),
        (torch.tensor([1, 3, -1]), "cut off"),
        (torch.tensor([1, 3, 2, 5, 9, 3, 3, 3, 4, 9, 3, 3, 3]), "steps must rise"),
    ],
)
def test_a_malformed_tensor_is_refused(tensor: torch.Tensor, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        RankHistory.from_tensor(LAYERS, tensor)


@pytest.mark.parametrize("ranks", [[1, 2], torch.tensor([1, 2]), torch.tensor([[1, 2, 3]])])
def test_a_rank_for_each_layer_is_required(ranks: list[int] | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one for each layer"):
        RankHistory(LAYERS).record(0, 3, ranks)


@pytest.mark.parametrize("ranks", [torch.ones(3), torch.ones(3, dtype=torch.bool), [1.5, 2, 3]])
def test_ranks_must_be_whole_numbers(ranks: torch.Tensor) -> None:
    with pytest.raises(TypeError):
        RankHistory(LAYERS).record(0, 3, ranks)


def test_a_refused_record_changes_nothing() -> None:
    history = filled()
    for step, ranks in ((100, [1, 2]), (100, [-1, 2, 3]), (-1, [1, 2, 3])):
        with pytest.raises(ValueError):
            history.record(step, 6, ranks)
    assert history == filled()


def test_in_a_notebook_a_history_shows_its_ends_and_at_most_12_moments() -> None:
    long = RankHistory(["fc<1>", "fc2"])
    for step in range(100):
        long.record(step, 200 - step, [8, step % 9])
    page = long._repr_html_()
    assert page.count("step ") == 12 and "step 0<" in page and "step 99<" in page
    assert "fc&lt;1&gt;" in page and "fc<1>" not in page
    assert "nothing is recorded" in RankHistory(["fc"])._repr_html_()
