"""A tiny model, a tiny table and a recipe for them, for the tests of recipes and the command line."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = "the a film plot actor scene was is very quite rather truly".split()
MOODS = {
    "positive": ["good", "great", "fine"],
    "negative": ["bad", "awful", "poor"],
    "neutral": ["plain", "usual"],
}


def save_tiny_model(folder: Path, **changes: Any) -> Path:
    """Save a random BERT with a word tokenizer, like a pretrained model: without a head."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *WORDS, *(word for mood in MOODS.values() for word in mood)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    wrapped.save_pretrained(str(folder))
    sizes = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    BertModel(BertConfig(**{**sizes, **changes})).save_pretrained(str(folder))
    return folder


def rows(count: int, seed: int = 0) -> list[tuple[str, str, float]]:
    """Sentences, each with a label and a number that some of its words determine."""
    chance = random.Random(seed)
    made = []
    for i in range(count):
        label = list(MOODS)[i % 3]
        sentence = [*chance.choices(WORDS, k=chance.randint(1, 3)), *chance.choices(MOODS[label], k=4)]
        chance.shuffle(sentence)
        made.append((" ".join(sentence), label, {"positive": 2.0, "negative": -2.0, "neutral": 0.25}[label]))
    return made


def write_table(path: Path, count: int = 60, seed: int = 0) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "rating"])
        writer.writerows(rows(count, seed))
    return path


def write_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """Write a recipe in ``folder``, changed as by `write_changed`."""
    recipe: dict[str, Any] = {
        "model": str(model),
        "task": "text-classification",
        "data": {"train": str(folder / "reviews.csv"), "held_out": 0.2},
        "adapter": {"target_modules": ["query", "value"], "init_r": 4, "target_r": 2, "lora_alpha": 8},
        "schedule": {"tinit": 2, "tfinal": 2, "deltaT": 2},
        "training": {
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
        },
        "output": str(folder / "out"),
    }
    return write_changed(folder, recipe, changes)


def write_changed(folder: Path, recipe: dict[str, Any], changes: dict[str, Any]) -> Path:
    """Write ``recipe.yaml``. ``changes`` replace whole keys; with a double underscore, a section's keys."""
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            recipe.setdefault(section, {})[key] = value
        else:
            recipe[section] = value
    recipe = {key: value for key, value in recipe.items() if value is not None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
