"""Pictures and histograms of the ranks for experiment trackers, in addition to the metrics that a trainer sends.

They go to all trackers that Trainer's ``report_to`` names: TensorBoard, Weights & Biases, MLflow, trackio. A tracker's
own callback holds its library and its run, so users set up nothing. Pictures need matplotlib; histograms do not.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from rankwise.integrations.common import run_of
from rankwise.run.summary import RankSummary

_PICTURES = 20  # largest number of pictures in a run; drawing one for a large model takes a second
_NAME = "ranks"


class RankPictures:
    """Sends the ranks of a trainer's model to its trackers if they have changed, about 20 times in a run.

    Args:
        trainer: a Transformers Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._sent: list[int] = []
        self._step = -1
        self._broken = False

    def after_log(self, logs: dict[str, Any]) -> None:
        """Send the ranks, if it is time to send them.

        Args:
            logs: the entry that has just been logged. The last entry of a run has ``train_runtime``.
        """
        state = self._trainer.state
        last = "train_runtime" in logs
        run = run_of(self._trainer.model)
        if run is None or run.allocation_state is None or self._broken or not (last or "loss" in logs):
            return
        every = max(1, state.max_steps // _PICTURES)
        senders = _senders(self._trainer.callback_handler.callbacks)
        if not senders or not (last or self._step < 0 or state.global_step - self._step >= every):
            return
        summary = run.rank_summary()  # called in every process, since it may gather factors from all
        ranks = [layer.rank for layer in summary.layers]
        if not state.is_world_process_zero or ranks == self._sent:
            return
        self._sent, self._step = ranks, state.global_step
        try:
            picture = _picture(summary, state.global_step)
            for send in senders:
                send(ranks, picture, state.global_step)
        except Exception as error:  # a tracker may raise anything, and a picture must not end the run
            self._broken = True
            warnings.warn(f"The trackers get no more pictures of the ranks: {error!r}", stacklevel=4)


Sender = Callable[[list[int], Any, int], None]


def _senders(callbacks: Iterable[Any]) -> list[Sender]:
    """Functions that send ranks and a picture of a step, one for each tracker among a trainer's callbacks."""
    found = []
    for callback in callbacks:
        for kind in type(callback).__mro__:
            make = _TRACKERS.get(kind.__name__)
            if make is not None:
                found.append(make(callback))
                break
    return found


def _picture(summary: RankSummary, step: int) -> Any:
    """The heat map as a Pillow image. None if matplotlib, which installs Pillow, is missing."""
    try:
        from PIL import Image

        # This package may not import `report` at its top, and only trackers need pictures.
        from rankwise.report.plots import heatmap_figure

        figure = heatmap_figure(summary, f"Rank of each layer after step {step:,}")
    except ImportError:
        return None
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return Image.open(file).convert("RGB")


def _to_tensorboard(callback: Any) -> Sender:
    def send(ranks: list[int], picture: Any, step: int) -> None:
        writer = callback.tb_writer
        if writer is None:
            return
        writer.add_histogram(f"{_NAME}/histogram", torch.tensor(ranks, device="cpu"), step)
        if picture is not None:
            width, height = picture.size
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            writer.add_image(f"{_NAME}/heatmap", pixels.view(height, width, 3), step, dataformats="HWC")

    return send


def _to_wandb(callback: Any) -> Sender:
    def send(ranks: list[int], picture: Any, step: int) -> None:
        wandb = callback._wandb
        if wandb is None or wandb.run is None:
            return
        values = {f"{_NAME}/histogram": wandb.Histogram(ranks), "train/global_step": step}
        if picture is not None:
            values[f"{_NAME}/heatmap"] = wandb.Image(picture)
        wandb.log(values)

    return send


def _to_mlflow(callback: Any) -> Sender:
    def send(ranks: list[int], picture: Any, step: int) -> None:
        mlflow = callback._ml_flow
        if mlflow is None or mlflow.active_run() is None:
            return
        counts = {str(rank): ranks.count(rank) for rank in sorted(set(ranks))}  # MLflow has no histograms
        mlflow.log_dict({"step": step, "layers_by_rank": counts}, f"{_NAME}/step-{step:06}.json")
        if picture is not None:
            mlflow.log_image(picture, f"{_NAME}/step-{step:06}.png")

    return send


def _to_trackio(callback: Any) -> Sender:
    def send(ranks: list[int], picture: Any, step: int) -> None:
        trackio = callback._trackio
        values = {f"{_NAME}/histogram": trackio.Histogram(ranks), "train/global_step": step}
        if picture is not None:
            values[f"{_NAME}/heatmap"] = trackio.Image(picture)
        trackio.log(values)

    return send


# The keys are names of Transformers' callbacks, which hold each library and its run.
_TRACKERS: dict[str, Callable[[Any], Sender]] = {
    "TensorBoardCallback": _to_tensorboard,
    "WandbCallback": _to_wandb,
    "MLflowCallback": _to_mlflow,
    "TrackioCallback": _to_trackio,
}
