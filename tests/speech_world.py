"""A tiny random Whisper, and clips of tones with one word for each tone, for the tests of speech recognition."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from recipe_world import write_changed

WORDS = {"low": 220.0, "middle": 880.0, "high": 3000.0}
RATE = 16000
# The first languages in Whisper's list: its tokenizer counts their tokens from the start token on.
LANGUAGES = ("en", "zh", "de", "es", "ru", "ko", "fr", "ja")
SECONDS = 2.0  # length of the tiny model's whole window


def save_tiny_whisper(folder: Path, *, multilingual: bool = False, **changes: Any) -> Path:
    """Save a random Whisper with a window of two seconds, and a tokenizer of single bytes."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [
        "<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>",
        "<|transcribe|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
    ]  # fmt: skip
    number = {token: i for i, token in enumerate([*alphabet, *special])}
    tokenizer = WhisperTokenizer(vocab=number, merges=[], model_max_length=64, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    extractor = WhisperFeatureExtractor(feature_size=20, chunk_length=int(SECONDS))
    WhisperProcessor(extractor, tokenizer).save_pretrained(str(folder))
    end, start = number["<|endoftext|>"], number["<|startoftranscript|>"]
    sizes = {
        "vocab_size": len(number), "num_mel_bins": 20, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_source_positions": int(50 * SECONDS), "max_target_positions": 32, "init_std": 0.2,
        "decoder_start_token_id": start, "eos_token_id": end, "bos_token_id": end, "pad_token_id": end,
        "begin_suppress_tokens": None, "suppress_tokens": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**{**sizes, **changes}))
    languages = {token: number[token] for token in (f"<|{code}|>" for code in LANGUAGES)}
    known = {
        "lang_to_id": languages,
        "task_to_id": {name: number[f"<|{name}|>"] for name in ("transcribe", "translate")},
    }
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start, eos_token_id=end, bos_token_id=end, pad_token_id=end, max_length=32,
        no_timestamps_token_id=number["<|notimestamps|>"], is_multilingual=multilingual, return_timestamps=False,
        **(known if multilingual else {}),
    )  # fmt: skip
    model.save_pretrained(str(folder))
    return folder


def tone(word: str, seconds: float = 0.5, rate: int = RATE, channels: int = 1) -> Any:
    """The samples of a word's tone, (n, channels)."""
    import numpy as np

    time = np.arange(int(seconds * rate)) / rate
    sound = 0.5 * np.sin(2 * np.pi * WORDS[word] * time)
    return np.repeat(sound[:, None], channels, axis=1)


def write_clip(path: Path, word: str, seconds: float = 0.5, rate: int = RATE, channels: int = 1) -> Path:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(word, seconds, rate, channels), rate)
    return path


# Extension, sample rate and channels of common files.
FORMS = ((".wav", 16000, 1), (".flac", 44100, 2), (".mp3", 24000, 1), (".ogg", 22050, 2), (".wav", 8000, 1))


def write_manifest(folder: Path, count: int = 24) -> Path:
    """Write clips into ``folder/clips``, and ``folder/manifest.csv`` with the columns ``audio`` and ``text``."""
    rows = []
    for i in range(count):
        word = list(WORDS)[i % len(WORDS)]
        suffix, rate, channels = FORMS[i % len(FORMS)]
        clip = write_clip(folder / "clips" / f"{i:02}{suffix}", word, 0.3 + 0.02 * i, rate, channels)
        rows.append((f"clips/{clip.name}", word))
    return write_rows(folder / "manifest.csv", rows)


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "text"])
        writer.writerows(rows)
    return path


def write_speech_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """Write a recipe in ``folder``, changed as by `write_changed`."""
    recipe: dict[str, Any] = {
        "model": str(model),
        "task": "speech-recognition",
        "data": {"train": str(folder / "manifest.csv"), "held_out": 6, "max_seconds": 1.0},
        "adapter": {
            "target_modules": ["q_proj", "v_proj", "fc1"],
            "init_r": 4,
            "target_r": 2,
            "lora_alpha": 8,
        },
        "schedule": {"tinit": 1, "tfinal": 1, "deltaT": 1},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 2,
        },
        "output": str(folder / "out"),
    }
    return write_changed(folder, recipe, changes)
