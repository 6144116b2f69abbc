"""The collator and the trainer for Whisper models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Seq2SeqTrainer
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from rankwise.recipes.trainer import RecipeTrainer


class SpeechCollator:
    """Makes batches of clips.

    A batch has log-mel ``input_features``, shape (batch, mel bins, frames), and ``labels``, shape (batch, tokens),
    padded with -100. The key ``input_features`` of an example holds the clip's samples.

    Args:
        feature_extractor: Whisper's feature extractor.
        window: the length, in seconds, to which every clip is padded with silence.
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


class SpeechTrainer(RecipeTrainer, Seq2SeqTrainer):
    """A trainer that generates in evaluation. When several processes evaluate, it counts each clip once."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Label smoothing takes the labels from the inputs. The decoder still needs them, shifted by one token."""
        if self.label_smoother is not None:
            config = self.accelerator.unwrap_model(model).config
            shifted = shift_tokens_right(inputs["labels"], config.pad_token_id, config.decoder_start_token_id)
            inputs = {**inputs, "decoder_input_ids": shifted}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, without the examples that were repeated to fill the last batch."""
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)
