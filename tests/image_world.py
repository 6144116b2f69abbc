"""A tiny random vision transformer, and pictures of three colours, for the tests of image classification."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

from recipe_world import write_changed

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
SUFFIXES = (".png", ".jpg", ".webp", ".bmp")


def save_tiny_vit(folder: Path) -> Path:
    """Save a random vision transformer for pictures of 16 by 16, like a pretrained model: without a head."""
    import torch
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8, "initializer_range": 0.3,
    }  # fmt: skip
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def write_photos(folder: Path, count: int, names: tuple[str, ...] = tuple(COLOURS)) -> None:
    """Write a folder ``photos`` with a subfolder of one-coloured pictures for each name, and ``photos.csv``."""
    from PIL import Image

    chance = random.Random(0)
    rows = []
    for i in range(count):
        name = names[i % len(names)]
        colour = list(COLOURS.values())[i % len(names)]
        varied = tuple(max(0, value + chance.randint(-25, 25)) for value in colour)
        file = folder / "photos" / name / f"{i:02}{SUFFIXES[i % len(SUFFIXES)]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i % 7, 24), varied).save(file)
        rows.append((f"photos/{name}/{file.name}", name))
    with (folder / "photos.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "label"), *rows])


def write_image_recipe(world: Path, model: Path, **changes: Any) -> Path:
    recipe: dict[str, Any] = {
        "model": str(model),
        "task": "image-classification",
        "data": {"train": str(world / "photos"), "held_out": 12},
        "adapter": {"target_modules": "all-linear", "init_r": 4, "target_r": 2, "lora_alpha": 8},
        "schedule": {"tinit": 1, "tfinal": 1, "deltaT": 1},
        "training": {"max_steps": 4, "per_device_train_batch_size": 6, "learning_rate": 0.02},
        "output": str(world / "out"),
    }
    return write_changed(world, recipe, changes)
