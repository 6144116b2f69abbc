"""Trackers that a Trainer reports to get pictures and histograms of the ranks. Each test uses the real library.

TensorBoard is installed with the tests. The others are installed separately: `make test-trackers`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from tiny import llama, token_batches, told

STEPS = 12


class Tokens(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.rows = [
            {name: values[row] for name, values in batch.items()}
            for batch in token_batches(STEPS)
            for row in range(4)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def train(folder: Path, tracker: str, **more: Any) -> Any:
    """Train a tiny model for a few steps, reporting to ``tracker``. Return the trainer."""
    from transformers import Trainer, TrainingArguments

    config = rw.AdaLoraConfig(
        init_r=4, target_r=1, tinit=2, tfinal=3, deltaT=1, target_modules=["q_proj", "down_proj"]
    )
    model = rw.get_peft_model(llama(), config)
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
        report_to=[tracker], disable_tqdm=True, use_cpu=True, learning_rate=1e-2, **more,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
    with told() as messages:
        trainer.train()
    trainer.told = [message for message in messages if "no more pictures" in message]
    return trainer


def changes(trainer: Any) -> list[int]:
    """The logged steps at which the ranks differ from those of the logged step before."""
    found, before = [], None
    for record in trainer.model.rank_history.records:
        if record.ranks != before and record.step:
            found.append(record.step)
        before = record.ranks
    return found


def test_tensorboard_gets_pictures_and_histograms_of_the_ranks(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tmp_path, "tensorboard")
    assert trainer.told == []
    [run] = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    histograms = events.Histograms("ranks/histogram")
    steps = [event.step for event in histograms]
    assert steps == sorted(set(steps)) and set(changes(trainer)) <= set(steps)
    ranks = [layer.rank for layer in trainer.model.rank_summary().layers]
    assert histograms[-1].histogram_value.sum == sum(ranks)
    assert histograms[-1].histogram_value.num == len(ranks)
    assert len(events.Scalars("train/budget")) == STEPS
    pictures = events.Images("ranks/heatmap")
    assert [event.step for event in pictures] == steps
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG") and pictures[0].width > 200


def test_a_broken_tracker_costs_its_pictures_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def broken(*args: Any, **options: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(SummaryWriter, "add_histogram", broken)
    trainer = train(tmp_path, "tensorboard")
    assert trainer.state.global_step == STEPS
    assert ["no room" in message for message in trainer.told] == [True]


def test_a_run_without_trackers_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("drawn for nobody")

    monkeypatch.setattr("rankwise.integrations.trackers._picture", never)
    assert train(tmp_path, "none").told == []


@pytest.mark.slow
def test_wandb_gets_pictures_and_histograms_of_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert train(tmp_path / "out", "wandb").told == []
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["ranks/heatmap"]["_type"] == "image-file"
    assert summary["ranks/histogram"]["_type"] == "histogram"
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/ranks/heatmap_*.png"))
    assert len(pictures) >= 3 and all(each.read_bytes().startswith(b"\x89PNG") for each in pictures)


@pytest.mark.slow
def test_mlflow_gets_pictures_and_counts_of_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    trainer = train(tmp_path / "out", "mlflow")
    assert trainer.told == []
    mlflow.end_run()
    pictures = sorted((tmp_path / "mlruns").glob("*/*/artifacts/ranks/step-*.png"))
    counts = sorted((tmp_path / "mlruns").glob("*/*/artifacts/ranks/step-*.json"))
    assert len(pictures) == len(counts) >= 3
    last = json.loads(counts[-1].read_text())["layers_by_rank"]
    ranks = [layer.rank for layer in trainer.model.rank_summary().layers]
    assert last == {str(rank): ranks.count(rank) for rank in set(ranks)}


@pytest.mark.slow
def test_trackio_gets_pictures_and_histograms_of_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read on import
    pytest.importorskip("trackio")
    trainer = train(tmp_path / "out", "trackio", trackio_space_id=None, project="ranks", run_name="one")
    assert trainer.told == []
    pictures = list((tmp_path / "trackio").rglob("*.png"))
    assert len(pictures) >= 3
