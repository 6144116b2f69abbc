"""Image classification from recipes: folders, tables and datasets of pictures, and pictures that can't be read."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import rankwise as rw
from image_world import COLOURS, save_tiny_vit, write_image_recipe, write_photos
from rankwise.recipes import RecipeError, Result, load_recipe, plan_memory, train
from rankwise.recipes.tasks import image_classification as task

COUNT = 48


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_photos(tmp_path, COUNT)
    return tmp_path


def run(world: Path, model: Path, **changes: Any) -> tuple[Result, str]:
    console = Console(file=StringIO(), width=100)
    result = train(load_recipe(write_image_recipe(world, model, **changes)), console=console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def read(world: Path, model: Path, **changes: Any) -> Any:
    return task.read_data(load_recipe(write_image_recipe(world, model, **changes)))


def test_a_run_learns_colours_and_its_printed_lines_tell_them(world: Path, tiny_vit: Path) -> None:
    result, said = run(world, tiny_vit, training__max_steps=40)
    assert result.after["accuracy"] > max(0.6, result.before["accuracy"])
    assert result.after["loss"] < result.before["loss"]
    assert "macro F1" in said
    lines = [line.removeprefix("  ") for line in said.partition("In Python:\n")[2].splitlines()]
    scope: dict[str, Any] = {"print": lambda value: scope.__setitem__("printed", value)}
    exec("\n".join(lines), scope)
    assert scope["printed"][0]["label"] in COLOURS


def test_the_adapter_brings_its_head_and_loads_in_peft(world: Path, tiny_vit: Path) -> None:
    import peft
    from transformers import AutoConfig, AutoModelForImageClassification

    result, _ = run(world, tiny_vit)
    config = AutoConfig.from_pretrained(result.folder)
    assert config.id2label == {0: "blue", 1: "green", 2: "red"}
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def base() -> Any:
        return AutoModelForImageClassification.from_pretrained(str(tiny_vit), config=config)

    with torch.no_grad():
        ours = rw.PeftModel.from_pretrained(base(), str(result.folder)).eval()(pixels).logits
        theirs = peft.PeftModel.from_pretrained(base(), str(result.folder)).eval()(pixels).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def make_parquet(world: Path) -> None:
    import datasets

    files = sorted((world / "photos").glob("*/*"))
    held = [{"bytes": file.read_bytes(), "path": None} for file in files]
    rows = datasets.Dataset.from_dict({"image": held, "label": [file.parent.name for file in files]})
    rows.cast_column("image", datasets.Image()).class_encode_column("label").to_parquet(
        world / "photos.parquet"
    )


@pytest.mark.parametrize("train_from", ["photos", "photos.csv", "photos.parquet"])
def test_pictures_are_found_wherever_people_keep_them(world: Path, tiny_vit: Path, train_from: str) -> None:
    make_parquet(world)
    data = read(world, tiny_vit, data__train=str(world / train_from))
    assert (len(data.train), len(data.evaluation), data.notes) == (COUNT - 12, 12, [])
    assert data.labels == ["blue", "green", "red"]
    assert sorted(data.evaluation["labels"]) == [0] * 4 + [1] * 4 + [2] * 4
    recipe = load_recipe(world / "recipe.yaml")
    arguments, _ = task.trainer_arguments(recipe, data, task.processor(recipe), None)
    batch = arguments["data_collator"]([arguments["train_dataset"][i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    # The label's colour is the brightest of the three.
    brightest = [["red", "green", "blue"][int(i)] for i in batch["pixel_values"].mean((2, 3)).argmax(1)]
    assert brightest == [data.labels[i] for i in batch["labels"]]


def test_a_bad_picture_is_left_out_counted_and_listed(world: Path, tiny_vit: Path) -> None:
    (world / "photos" / "blue" / "02.webp").write_bytes(b"<html>")
    _, said = run(world, tiny_vit)
    told = "1 of 48 pictures left out: photos/blue/02.webp: 'blue/02.webp' can't be read as a picture."
    assert told in " ".join(said.split())
    with pytest.raises(RecipeError, match="data.image: photos/blue/02.webp 'blue/02.webp' can't be read"):
        read(world, tiny_vit, data__bad_files="error")


def test_a_missing_picture_is_named_with_its_line(world: Path, tiny_vit: Path) -> None:
    (world / "photos" / "red" / "00.png").unlink()
    notes = read(world, tiny_vit, data__train=str(world / "photos.csv")).notes
    assert notes == ["1 of 48 pictures left out: photos.csv, line 2: 'photos/red/00.png' does not exist."]


def test_a_picture_that_is_cut_short_gives_its_place_to_the_next(world: Path, tiny_vit: Path) -> None:
    data = read(world, tiny_vit)
    recipe = load_recipe(world / "recipe.yaml")
    arguments, _ = task.trainer_arguments(recipe, data, task.processor(recipe), None)
    index = next(i for i, row in enumerate(data.train) if row["image"].endswith(".png"))
    file = Path(data.train[index]["image"])
    file.write_bytes(file.read_bytes()[:60])
    with pytest.warns(UserWarning, match="can't be read as a picture.*the next file takes its place"):
        arguments["train_dataset"][index]


def test_a_picture_in_two_rows_is_not_both_trained_on_and_held_out(world: Path, tiny_vit: Path) -> None:
    first, *rows = (world / "photos.csv").read_text().splitlines()
    again = [row.replace("photos/", "photos/../photos/") for row in rows[:5]]
    (world / "photos.csv").write_text("\n".join([first, *rows, *again]))
    data = read(world, tiny_vit, data__train=str(world / "photos.csv"))
    assert len(data.train) + len(data.evaluation) == COUNT
    assert (
        "5 rows left out that repeat another's file, so that no file is both trained on and held out."
        in data.notes
    )
    (world / "few.csv").write_text("\n".join([first, *rows[:3]]))
    tables = {"data__train": str(world / "photos.csv"), "data__eval": str(world / "few.csv")}
    notes = read(world, tiny_vit, **tables, data__held_out=None).notes
    assert "3 of 3 rows in `eval` are trained on, too, which makes the result too good." in notes


def test_a_picture_under_two_names_is_not_both_trained_on_and_held_out(world: Path, tiny_vit: Path) -> None:
    first = min((world / "photos" / "red").iterdir())
    (world / "photos" / "green" / f"copy{first.suffix}").write_bytes(first.read_bytes())
    changed = bytearray(first.read_bytes()) + b"0"
    (world / "photos" / "green" / f"longer{first.suffix}").write_bytes(changed)
    data = read(world, tiny_vit)
    assert len(data.train) + len(data.evaluation) == COUNT + 1
    assert any(note.startswith("1 row left out that repeat") for note in data.notes)


def test_contents_of_pictures_are_compared_too(world: Path, tiny_vit: Path) -> None:
    import datasets

    files = sorted((world / "photos" / "red").iterdir())[:6]
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in [*files, *files]],
        "label": ["a", "b"] * 6,
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(world / "saved"))
    data = read(world, tiny_vit, data__train=str(world / "saved"), data__held_out=2)
    assert len(data.train) + len(data.evaluation) == 6


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_a_picture_with_more_than_8_bits_is_not_read_as_white(world: Path, tiny_vit: Path, kind: str) -> None:
    import numpy as np
    from PIL import Image

    deep = Image.fromarray(np.linspace(0, 60000, 24 * 24).reshape(24, 24).astype(kind))
    deep.save(world / "photos" / "red" / "deep.tif")
    (note,) = read(world, tiny_vit).notes
    assert "deep.tif' has more than 8 bits per pixel (mode " in note and note.endswith("save it with 8 bits.")


def test_pictures_cannot_be_grouped_by_length(world: Path, tiny_vit: Path) -> None:
    given = ["training.train_sampling_strategy=group_by_length"]
    with pytest.raises(RecipeError, match="training.train_sampling_strategy: group_by_length is for texts"):
        load_recipe(write_image_recipe(world, tiny_vit), given)


def test_a_folder_without_pictures_is_refused(world: Path, tiny_vit: Path) -> None:
    (world / "empty").mkdir()
    with pytest.raises(
        RecipeError, match="no metadata.csv, and no sub-folders with pictures, one for each label"
    ):
        read(world, tiny_vit, data__train=str(world / "empty"))


def test_a_label_that_is_missing_is_named_with_its_line(world: Path, tiny_vit: Path) -> None:
    text = (world / "photos.csv").read_text().replace("00.png,red", "00.png,")
    (world / "photos.csv").write_text(text)
    with pytest.raises(RecipeError, match="photos.csv, line 2 has no label in 'label'"):
        read(world, tiny_vit, data__train=str(world / "photos.csv"))


def test_memory_is_estimated_without_any_data(world: Path, tiny_vit: Path) -> None:
    recipe = write_image_recipe(world, tiny_vit, data__train="nowhere")
    found = plan_memory(load_recipe(recipe, data_needed=False))
    assert found.batch == {"pixel_values": (6, 3, 16, 16), "labels": (6,)}
    assert found.activations
