"""Sentences that espeak-ng reads, written down by whisper-tiny.en.

The clips are made by ``recipes/speech/make_data.py``. Whisper hears four seconds of each, not thirty.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence

import soundfile
import soxr
import torch
from tasks import Batch, Sources, Task, placed, shuffled
from torch import Tensor, nn

from rankwise.recipes.tasks.speech_recognition import whisper

_LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_FEWER = {0.25: ("q_proj", "v_proj"), 0.5: ("q_proj", "k_proj", "v_proj", "out_proj")}
_STEPS, _SIZE, _HELD_OUT = 56, 8, 128
_SECONDS, _RATE = 4.0, 16_000


def _clips(sources: Sources) -> list[tuple[Tensor, str]]:
    """Features, (80, 400), and transcripts of all clips that are short enough."""
    from transformers import AutoFeatureExtractor

    if sources.speech is None:
        raise ValueError("--speech must name the table that recipes/speech/make_data.py wrote")
    extract = AutoFeatureExtractor.from_pretrained(sources.whisper)
    found = []
    with open(sources.speech, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            sound, rate = soundfile.read(sources.speech.parent / row["audio"], dtype="float32")
            sound = soxr.resample(sound, rate, _RATE)
            if len(sound) <= _SECONDS * _RATE:
                made = extract(
                    sound, sampling_rate=_RATE, return_tensors="pt",
                    padding="max_length", max_length=int(_SECONDS * _RATE),
                )  # fmt: skip
                found.append((made.input_features[0], row["text"]))
    return found


def make(name: str, sources: Sources) -> Task:
    """``speech``."""
    from transformers import AutoTokenizer, WhisperForConditionalGeneration

    clips = _clips(sources)
    if len(clips) < _HELD_OUT + _STEPS * _SIZE:
        raise ValueError(
            f"--speech: {_HELD_OUT + _STEPS * _SIZE} clips of at most {_SECONDS:g} s are needed, "
            f"and {sources.speech} has {len(clips)}: make them with --clips 800"
        )
    tokenizer = AutoTokenizer.from_pretrained(sources.whisper)
    labels = whisper.transcript_tokens(tokenizer, [text for _, text in clips], None)
    normalize = whisper.normalizer(tokenizer, None)

    def batch(places: Sequence[int]) -> Batch:
        longest = max(len(labels[place]) for place in places)
        padded = [labels[place] + [-100] * (longest - len(labels[place])) for place in places]
        features = torch.stack([clips[place][0] for place in places])
        return {"input_features": features, "labels": torch.tensor(padded)}

    def load(seed: int) -> nn.Module:
        model: nn.Module = WhisperForConditionalGeneration.from_pretrained(
            sources.whisper, dtype=torch.float32
        )
        whisper.shorten_window(model, int(_SECONDS * 50))
        return model

    def batches(seed: int) -> Iterator[Batch]:
        order = [_HELD_OUT + place for place in shuffled(len(clips) - _HELD_OUT, seed)]
        for step in range(_STEPS):
            yield batch(order[step * _SIZE : (step + 1) * _SIZE])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value: Tensor = model(**placed(batch, model)).loss
        return value

    def evaluate(model: nn.Module) -> dict[str, float]:
        total, tokens, guesses = 0.0, 0, []
        for start in range(0, _HELD_OUT, 32):
            part = batch(range(start, start + 32))
            counted = int((part["labels"] != -100).sum())
            total += float(loss(model, part)) * counted
            tokens += counted
            written = model.generate(  # type: ignore[operator]
                input_features=placed(part, model)["input_features"], max_new_tokens=40, max_length=None
            )
            guesses += tokenizer.batch_decode(written, skip_special_tokens=True)
        texts = [text for _, text in clips[:_HELD_OUT]]
        return {"loss": total / tokens, "wer": whisper.word_error_rate(texts, guesses, normalize)}

    return Task(name, _STEPS, _LINEAR, [], load, batches, loss, evaluate, _FEWER)
