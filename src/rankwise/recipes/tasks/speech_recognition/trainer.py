"""What feeds a Whisper model in training and evaluation: log-mel features batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Seq2SeqTrainer


class SpeechCollator:
    """Makes batches: ``input_features`` (batch, mel bins, frames) and ``labels`` (batch, tokens), -100 for padding.

    Args:
        feature_extractor: Whisper's; it gets the samples that an example calls ``input_features``.
        window: seconds that every clip is filled up to with silence.
    """

    def __init__(self, feature_extractor: Any, window: float) -> None:
        self.feature_extractor = feature_extractor
        self.samples = round(window * feature_extractor.sampling_rate)

    def __call__(self, clips: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        found = self.feature_extractor(
            [clip["input_features"] for clip in clips],
            sampling_rate=self.feature_extractor.sampling_rate,
            max_length=self.samples,
            return_tensors="pt",
        )
        labels = [torch.tensor(clip["labels"]) for clip in clips]
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return {"input_features": found.input_features, "labels": padded}


class SpeechTrainer(Seq2SeqTrainer):
    """A trainer that writes in evaluation, and counts each clip once when several processes evaluate."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; batches that were filled up for the last process are cut again."""
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)
