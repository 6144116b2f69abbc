"""Speech recognition from recipes: every kind of audio and manifest, faults in them, and the window."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import rankwise as rw
from rankwise.recipes import RecipeError, Result, load_recipe, plan, plan_memory, train
from rankwise.recipes.data import audio
from rankwise.recipes.preparing import preparing
from rankwise.recipes.tasks.speech_recognition import task, whisper
from speech_world import (
    FORMS,
    WORDS,
    save_tiny_whisper,
    tone,
    write_clip,
    write_manifest,
    write_speech_recipe,
)


@pytest.fixture(scope="session")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_whisper(tmp_path_factory.mktemp("whisper-en"))


@pytest.fixture(scope="session")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_whisper(tmp_path_factory.mktemp("whisper"), multilingual=True)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_manifest(tmp_path)
    return tmp_path


def run(world: Path, model: Path, *overrides: str, **changes: Any) -> tuple[Result, str]:
    console = Console(file=StringIO(), width=100)
    result = train(load_recipe(write_speech_recipe(world, model, **changes), overrides), console=console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def read(world: Path, model: Path, **changes: Any) -> Any:
    return task.read_data(load_recipe(write_speech_recipe(world, model, **changes)))


def whole_model(folder: Path) -> Any:
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


# --- audio -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "rate", "channels"), FORMS)
def test_every_kind_of_file_gives_the_same_sound(
    tmp_path: Path, suffix: str, rate: int, channels: int
) -> None:
    file = write_clip(tmp_path / f"clip{suffix}", "middle", 0.5, rate, channels)
    assert audio.seconds(str(file)) == pytest.approx(0.5, abs=0.05)
    found = audio.decode(str(file), 16000, 30.0)
    assert found.dtype == np.float32 and found.ndim == 1
    assert np.abs(np.fft.rfft(found)).argmax() * 16000 / len(found) == pytest.approx(880, abs=5)
    inner = found[2000:6000]
    assert np.sqrt((inner**2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)
    assert np.allclose(audio.decode(file.read_bytes(), 16000, 30.0), found)


def test_channels_of_opposite_sign_do_not_silence_each_other(tmp_path: Path) -> None:
    import soundfile

    tone = (0.5 * np.sin(np.arange(8000) / 8)).astype(np.float32)
    soundfile.write(tmp_path / "clip.wav", np.stack([tone, -tone], axis=1), 16000)
    assert np.abs(audio.decode(str(tmp_path / "clip.wav"), 16000, 30.0)).max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    """One such clip makes the loss of all held-out clips NaN."""
    soundfile = pytest.importorskip("soundfile")
    samples = np.full(100, 0.1, np.float32)
    samples[50] = value
    soundfile.write(tmp_path / "broken.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match="holds samples that are NaN or infinite"):
        audio.decode(str(tmp_path / "broken.wav"), 16000, 1.0)


def test_only_as_much_as_is_wanted_is_read(tmp_path: Path) -> None:
    file = write_clip(tmp_path / "clip.wav", "low", 2.0, 8000)
    assert len(audio.decode(str(file), 16000, 0.5)) == pytest.approx(8000, abs=4)


# --- the model's own conventions -----------------------------------------------------------------------------------


def test_labels_hold_language_and_task_once_and_no_start(multilingual: Path, world: Path) -> None:
    """The model itself puts the start token before the labels. If they had one, it would occur twice."""
    recipe = load_recipe(write_speech_recipe(world, multilingual, generation={"language": "German"}))
    tokenizer = task.processor(recipe).tokenizer
    (ids,) = whisper.transcript_tokens(tokenizer, ["low"], recipe.writes)
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|de|>", "<|transcribe|>", "<|notimestamps|>", "Ġ", "l", "o", "w", "<|endoftext|>",
    ]  # fmt: skip


def test_labels_of_an_english_model_hold_no_language(english: Path, world: Path) -> None:
    recipe = load_recipe(write_speech_recipe(world, english))
    tokenizer = task.processor(recipe).tokenizer
    (ids,) = whisper.transcript_tokens(tokenizer, ["low"], recipe.writes)
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|notimestamps|>"


def test_padding_takes_no_part_in_the_loss(english: Path, world: Path) -> None:
    """In a batch with a long transcript, a short one has the same loss as alone."""
    recipe = load_recipe(write_speech_recipe(world, english, data__max_seconds=None))
    data, processor, model = task.read_data(recipe), task.processor(recipe), whole_model(english)
    arguments, _ = task.trainer_arguments(recipe, data, processor, model)
    clips = sorted(arguments["train_dataset"], key=lambda clip: len(clip["labels"]))
    short, long = clips[0], clips[-1]
    assert len(short["labels"]) < len(long["labels"])

    def loss(*chosen: Any) -> float:
        batch = arguments["data_collator"](chosen)
        with torch.no_grad():
            total = model(**batch).loss * (batch["labels"] != -100).sum()
        return float(total)

    assert loss(short, long) == pytest.approx(loss(short) + loss(long), rel=1e-4)


def test_texts_are_compared_without_case_punctuation_and_spelling_of_numbers(english: Path) -> None:
    normalize = whisper.normalizer(object(), None)
    assert whisper.word_error_rate(["It's twenty-one, Mr. Smith."], ["it is 21 mister smith"], normalize) == 0
    assert whisper.word_error_rate(["one two three four"], ["one two four"], str) == 0.25
    japanese = whisper.normalizer(object(), "ja")
    assert whisper.word_error_rate(["こんにちは"], ["こんばちは"], japanese) == pytest.approx(0.2)


def test_a_short_window_is_a_model_made_for_it_and_leaves_the_weights_whole(english: Path) -> None:
    """The shortened encoder computes the same as an encoder with that many positions. Longer input is cut."""
    from transformers import WhisperForConditionalGeneration

    model, whole = whole_model(english), whole_model(english)
    whisper.shorten_window(model, 40)
    whole.config.max_source_positions = 40
    made_for_it = WhisperForConditionalGeneration(whole.config).eval()
    weights = whole.state_dict()
    weights["model.encoder.embed_positions.weight"] = weights["model.encoder.embed_positions.weight"][:40]
    made_for_it.load_state_dict(weights)
    features = torch.randn(1, 20, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        heard = model.get_encoder()(features).last_hidden_state
        assert torch.equal(heard, model.get_encoder()(input_features=features[..., :80]).last_hidden_state)
        assert torch.equal(heard, made_for_it.get_encoder()(features[..., :80]).last_hidden_state)
        assert model.generate(features, max_new_tokens=4).shape[0] == 1
    assert model.get_encoder().embed_positions.weight.shape == (100, 32)
    assert model.config.max_source_positions == 100


# --- manifests ---------------------------------------------------------------------------------------------------


def make_csv(world: Path) -> None:
    pass


def make_json_lines(world: Path) -> None:
    rows = [json.dumps({"audio": f"clips/{file.name}", "text": "low"}) for file in clips(world)]
    (world / "manifest.jsonl").write_text("\n".join(rows))


def make_parquet_of_paths(world: Path) -> None:
    import datasets

    rows = {"audio": [str(file) for file in clips(world)], "text": ["low"] * 24}
    datasets.Dataset.from_dict(rows).to_parquet(world / "manifest.parquet")


def make_parquet_of_contents(world: Path) -> None:
    import datasets

    held = [{"bytes": file.read_bytes(), "path": file.name} for file in clips(world)]
    rows = datasets.Dataset.from_dict({"audio": held, "text": ["low"] * 24})
    rows.cast_column("audio", datasets.Audio()).to_parquet(world / "manifest.parquet")


def make_saved_dataset(world: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"audio": [str(file) for file in clips(world)], "text": ["low"] * 24})
    rows = rows.cast_column("audio", datasets.Audio())
    datasets.DatasetDict({"train": rows}).save_to_disk(world / "saved")


def make_folder_with_metadata(world: Path) -> None:
    table = (world / "manifest.csv").read_text().replace("audio,text", "file_name,text").replace("clips/", "")
    (world / "clips" / "metadata.csv").write_text(table)


def make_folder_with_text_files(world: Path) -> None:
    for file in clips(world):
        target = world / "texts" / "speaker" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        target.with_suffix(".txt").write_text("low\n")


def clips(world: Path) -> list[Path]:
    return sorted((world / "clips").iterdir())


@pytest.mark.parametrize(
    ("make", "train_from"),
    [
        (make_csv, "manifest.csv"),
        (make_json_lines, "manifest.jsonl"),
        (make_parquet_of_paths, "manifest.parquet"),
        (make_parquet_of_contents, "manifest.parquet"),
        (make_saved_dataset, "saved"),
        (make_folder_with_metadata, "clips"),
        (make_folder_with_text_files, "texts"),
    ],
)
def test_clips_are_found_wherever_people_keep_them(
    world: Path, english: Path, make: Any, train_from: str
) -> None:
    make(world)
    data = read(world, english, data__train=str(world / train_from))
    assert (len(data.train), len(data.evaluation), data.notes) == (18, 6, [])
    recipe = load_recipe(world / "recipe.yaml")
    arguments, _ = task.trainer_arguments(recipe, data, task.processor(recipe), whole_model(english))
    batch = arguments["data_collator"]([arguments["train_dataset"][i] for i in range(3)])
    assert batch["input_features"].shape == (3, 20, 100)
    assert batch["input_features"].isfinite().all()


def test_columns_go_by_the_names_that_the_recipe_gives(world: Path, english: Path) -> None:
    table = (world / "manifest.csv").read_text().replace("audio,text", "path,sentence", 1)
    (world / "manifest.csv").write_text(table)
    assert len(read(world, english, data__audio="path", data__text="sentence").train) == 18
    with pytest.raises(
        RecipeError, match="data.text: manifest.csv has no column 'text'; it has path, sentence"
    ):
        read(world, english, data__audio="path")


# --- faults in the data --------------------------------------------------------------------------------------------


def spoil(world: Path, count: int) -> None:
    """Spoil rows 2, 4, ... of the table with three kinds of bad files in turn."""
    lines = (world / "manifest.csv").read_text().splitlines()
    for i in range(count):
        row = 1 + 2 * i
        file = world / lines[row + 1].split(",")[0]
        if i % 3 == 0:
            file.unlink()
        else:
            file.write_bytes(b"" if i % 3 == 1 else b"<html>404 Not Found</html>")


def test_a_bad_file_is_left_out_counted_and_listed(world: Path, english: Path) -> None:
    spoil(world, 2)
    result, said = run(world, english)
    assert result.after
    words = " ".join(said.split())
    assert (
        "2 of 24 audio files left out: manifest.csv, line 3: 'clips/01.flac' does not exist; manifest.csv, line 5:"
        in words
    )
    assert "'clips/03.ogg' can't be read as audio" in words


def test_looking_at_files_shows_how_far_it_is(world: Path, english: Path) -> None:
    console = Console(file=StringIO(), width=100, force_terminal=True)
    with preparing(console, "reading the data"):
        read(world, english)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "checking audio files" in said and "24/24" in said


def test_a_bad_file_ends_the_run_if_the_recipe_says_so(world: Path, english: Path) -> None:
    spoil(world, 1)
    with pytest.raises(RecipeError, match="data.audio: manifest.csv, line 3 'clips/01.flac' does not exist"):
        read(world, english, data__bad_files="error")


def test_many_bad_files_are_no_accident(world: Path, english: Path) -> None:
    spoil(world, 5)
    with pytest.raises(RecipeError, match="5 of 24 audio files in .* can't be used: too many") as error:
        read(world, english)
    assert "line 3 'clips/01.flac' does not exist" in str(error.value) and "2 rows more" in str(error.value)
    for enough in (5, 0.25):
        assert len(read(world, english, data__bad_files=enough).train) == 24 - 5 - 6


def test_a_clip_that_breaks_off_while_training_gives_its_place_to_the_next(
    world: Path, english: Path
) -> None:
    data = read(world, english)
    from rankwise.recipes.data.file_examples import FileExamples

    def decode(source: str | bytes) -> Any:
        return audio.decode(source, 16000, 1.0)

    Path(data.train[3]["audio"]).write_bytes(b"RIFF")
    found = FileExamples(data.train, "audio", decode, "sound", strict=False)
    with pytest.warns(UserWarning, match="can't be read as audio.*the next file takes its place"):
        assert np.array_equal(found[3]["sound"], found[4]["sound"])
    with pytest.raises(audio.AudioError, match="can't be read as audio"):
        FileExamples(data.train, "audio", decode, "sound", strict=True)[3]


def test_a_clip_without_a_transcript_is_left_out_and_reported(world: Path, english: Path) -> None:
    lines = (world / "manifest.csv").read_text().splitlines()
    lines[4] = lines[4].split(",")[0] + ", "
    (world / "manifest.csv").write_text("\n".join(lines))
    assert read(world, english).notes == ["1 row without text left out (manifest.csv, line 5)."]


def test_a_clip_in_two_rows_is_not_both_trained_on_and_held_out(world: Path, english: Path) -> None:
    whole = read(world, english)
    lines = (world / "manifest.csv").read_text().splitlines()
    (world / "manifest.csv").write_text("\n".join([*lines, *lines[1:4]]))
    data = read(world, english)
    assert (len(data.train), len(data.evaluation)) == (len(whole.train), len(whole.evaluation))
    assert any("3 rows left out that repeat another's file" in note for note in data.notes)


def test_long_clips_are_dropped_cut_or_refused(world: Path, english: Path) -> None:
    write_clip(world / "clips" / "00.wav", "low", 1.5)
    assert read(world, english).notes == [
        "1 of 24 clips longer than 1 seconds left out (manifest.csv, line 2)."
    ]
    cut = read(world, english, data__too_long="truncate")
    assert (len(cut.train) + len(cut.evaluation), cut.notes) == (
        24,
        ["1 of 24 clips longer than 1 seconds cut (manifest.csv, line 2)."],
    )
    with pytest.raises(RecipeError, match="data.too_long: manifest.csv, line 2 has 1.5 seconds, 1 fit"):
        read(world, english, data__too_long="error")


def test_long_transcripts_are_dropped_cut_or_refused(world: Path, english: Path) -> None:
    lines = (world / "manifest.csv").read_text().splitlines()
    lines[1] = lines[1].split(",")[0] + "," + 40 * "low "
    (world / "manifest.csv").write_text("\n".join(lines))
    assert read(world, english).notes == [
        "1 of 24 transcripts longer than 32 tokens left out (manifest.csv, line 2)."
    ]
    cut = read(world, english, data__too_long="truncate")
    longest = max([*cut.train["labels"], *cut.evaluation["labels"]], key=len)
    assert len(longest) == 32 and longest[-1] == 256  # it still ends with the end token
    with pytest.raises(RecipeError, match="line 2 has 162 tokens, 32 fit"):
        read(world, english, data__too_long="error")


def test_more_time_or_tokens_than_the_model_takes_are_refused(world: Path, english: Path) -> None:
    with pytest.raises(RecipeError, match="data.max_seconds: is 3, but the model takes at most 2 seconds"):
        read(world, english, data__max_seconds=3.0)
    with pytest.raises(RecipeError, match="data.max_tokens: is 64, but the model takes at most 32 tokens"):
        read(world, english, data__max_tokens=64)


def test_an_english_model_is_given_no_language(world: Path, english: Path) -> None:
    with pytest.raises(RecipeError, match="generation.language: is for multilingual models"):
        read(world, english, generation={"language": "en"})


def test_a_multilingual_model_needs_a_language_that_it_knows(world: Path, multilingual: Path) -> None:
    with pytest.raises(RecipeError, match="generation.language: is missing"):
        read(world, multilingual)
    with pytest.raises(RecipeError, match="does not know 'germn'. Did you mean 'german'?"):
        read(world, multilingual, generation={"language": "germn"})


def test_a_multilingual_model_without_its_languages_is_refused_with_what_is_missing(
    world: Path, multilingual: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(multilingual, tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "vocab_size": 51865}))
    with pytest.raises(RecipeError, match="model: .* has no generation_config.json with its languages"):
        read(world, bare, generation={"language": "german"})


def test_other_architectures_are_refused_by_name(world: Path, tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config

    Wav2Vec2Config().save_pretrained(tmp_path / "other")
    with pytest.raises(RecipeError, match="is a wav2vec2 model; speech-recognition trains Whisper models"):
        read(world, tmp_path / "other")


# --- training ----------------------------------------------------------------------------------------------------


def test_a_run_learns_which_word_goes_with_which_tone(world: Path, english: Path) -> None:
    result, said = run(
        world, english, training__max_steps=40, training__learning_rate=0.02, training__eval_steps=30,
        training__logging_steps=30,
    )  # fmt: skip
    assert result.after["loss"] < 0.5 * result.before["loss"]
    assert {"wer", "loss"} == set(result.before) == set(result.after)
    words = " ".join(said.split())
    for part in ("step 30: word error rate", "word error rate", "held-out loss", "On 6 held-out examples"):
        assert part in words, part


def test_an_adapter_trained_in_a_short_window_works_in_the_whole_model(world: Path, english: Path) -> None:
    """The saved folder does not mention the window, the printed lines run, and PEFT reads the adapter, too."""
    import peft
    from transformers import AutoProcessor

    result, said = run(world, english)
    assert json.loads((result.folder / "config.json").read_text())["max_source_positions"] == 100
    sizes = {tuple(tensor.shape) for tensor in tensors(result.folder).values()}
    assert not any(100 in shape or 50 in shape for shape in sizes)
    lines = [line.removeprefix("  ") for line in said.partition("In Python:\n")[2].splitlines()]
    scope: dict[str, Any] = {"print": lambda value: scope.__setitem__("printed", value)}
    exec("\n".join(lines), scope)
    assert isinstance(scope["printed"], str)
    processor = AutoProcessor.from_pretrained(result.folder)
    features = processor(tone("low")[:, 0], sampling_rate=16000, return_tensors="pt").input_features
    assert features.shape == (1, 20, 200)
    inputs = {"input_features": features, "decoder_input_ids": torch.tensor([[257, 270]])}
    with torch.no_grad():
        ours = rw.PeftModel.from_pretrained(whole_model(english), str(result.folder)).eval()(**inputs).logits
        theirs = (
            peft.PeftModel.from_pretrained(whole_model(english), str(result.folder)).eval()(**inputs).logits
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_a_multilingual_model_trains_and_reports_its_language(world: Path, multilingual: Path) -> None:
    result, said = run(world, multilingual, generation={"language": "ja"}, training__max_steps=3)
    assert "character error rate" in said
    assert "language='ja', task='transcribe'" in said
    lines = [line.removeprefix("  ") for line in said.partition("In Python:\n")[2].splitlines()]
    exec("\n".join(lines), {"print": lambda value: None})


def test_half_precision_weights_train_and_write(world: Path, english: Path) -> None:
    result, _ = run(world, english, dtype="bfloat16", training__max_steps=3)
    assert result.after["loss"] < 100
    assert {tensor.dtype for tensor in tensors(result.folder).values()} == {torch.float32}


def test_label_smoothing_trains_and_leaves_the_held_out_loss_alone(world: Path, english: Path) -> None:
    def trained(factor: float) -> Any:
        short = [
            "training.max_steps=4",
            f"training.label_smoothing_factor={factor}",
            f"output={world / str(factor)}",
        ]
        return train(load_recipe(write_speech_recipe(world, english), short), console=Console(quiet=True))

    plain, smoothed = trained(0.0), trained(0.2)
    assert smoothed.before == plain.before and smoothed.after["loss"] != plain.after["loss"]


def test_memory_is_estimated_for_the_window_without_any_data(world: Path, english: Path) -> None:
    recipe = write_speech_recipe(world, english, data__train="nowhere/manifest.csv")
    found = plan_memory(load_recipe(recipe, data_needed=False))
    assert found.batch == {"input_features": (4, 20, 100), "labels": (4, 32)}
    assert found.activations


def test_a_plan_counts_clips_that_remain(world: Path, english: Path) -> None:
    spoil(world, 1)
    planned = plan(load_recipe(write_speech_recipe(world, english)))
    assert (planned.train_rows, planned.held_out_rows, planned.modules_to_save) == (17, 6, ())


def test_the_words_of_the_tones_differ_in_length() -> None:
    """The test of padding relies on this."""
    assert len({len(word) for word in WORDS}) > 1
