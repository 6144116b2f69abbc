"""Predicting labels of pictures, and transcripts of audio files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from rankwise.recipes.data import audio, pictures
from rankwise.recipes.data.files import Kind, beside, leave_out, source_of, usable_files
from rankwise.recipes.predicting.job import Job, likeliest

PICTURES = Kind(
    name="picture",
    column="data.image",
    rows_of_folder=lambda folder: {"image": beside(folder, pictures.SUFFIXES)},
    folder_hint="no pictures",
)
CLIPS = Kind(
    name="audio file",
    column="data.audio",
    rows_of_folder=lambda folder: {"audio": beside(folder, audio.SUFFIXES)},
    folder_hint="no audio files",
)


def picture_columns(recipe: Any) -> dict[str, str]:
    """The name of the column to read, by its key in the recipe."""
    return {"data.image": recipe.data.image}


def clip_columns(recipe: Any) -> dict[str, str]:
    """The name of the column to read, by its key in the recipe."""
    return {"data.audio": recipe.data.audio}


def label_pictures(job: Job) -> list[dict[str, Any] | None]:
    """The label, its probability and all labels' probabilities, for each picture. None for pictures left out."""

    def of_batch(images: list[Any]) -> Sequence[dict[str, Any]]:
        found = job.processor(images=images, return_tensors="pt")
        logits = job.model(pixel_values=found.pixel_values.to(job.model.device, job.model.dtype)).logits
        return list(likeliest(logits, job.saved.labels or ()))

    return _predict(job, PICTURES, pictures.size, pictures.decode, of_batch)


def write_down(job: Job) -> list[dict[str, Any] | None]:
    """The transcript of each clip. None for clips left out."""
    from rankwise.recipes.tasks.speech_recognition import task
    from rankwise.recipes.tasks.speech_recognition.trainer import SpeechCollator

    task.set_generation(job.recipe, job.processor, job.model)
    extractor, tokenizer = job.processor.feature_extractor, job.processor.tokenizer
    window = task.window_seconds(job.recipe, job.model.config)
    collate = SpeechCollator(extractor, window)
    chosen = {} if job.max_new_tokens is None else {"max_new_tokens": job.max_new_tokens}

    def of_batch(clips: list[Any]) -> Sequence[dict[str, Any]]:
        features = collate([{"input_features": clip, "labels": [0]} for clip in clips])["input_features"]
        tokens = job.model.generate(features.to(job.model.device), **chosen)
        return [{"": text.strip()} for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    decode = functools.partial(audio.decode, rate=extractor.sampling_rate, longest=window)
    return _predict(job, CLIPS, audio.seconds, decode, of_batch, longest=window)


def _predict(
    job: Job,
    kind: Kind,
    look: Callable[[str | bytes], Any],
    decode: Callable[[str | bytes], Any],
    of_batch: Callable[[list[Any]], Sequence[dict[str, Any]]],
    longest: float | None = None,
) -> list[dict[str, Any] | None]:
    """Predict files, which are decoded batch by batch. Bad files get None.

    Args:
        job: the rows to predict.
        kind: the kind of files.
        look: a function that checks a path or contents. For a clip it returns the seconds.
        decode: a function that decodes a path or contents.
        of_batch: a function that predicts a list of decoded files.
        longest: the most seconds of a clip that are read. None: the files are not clips.
    """
    table = job.table
    policy, count = job.recipe.data.bad_files, len(table.rows)
    sizes = usable_files(kind, table, range(count), look, policy, job.notes)
    long = sum(longest is not None and size > longest for size in sizes.values())
    if long:
        job.notes.append(
            f"{long:,} of {count:,} clips are longer than {longest:g} seconds; the rest of each is not heard."
        )
    rows = list(sizes)
    column = table.rows.column_names[0]
    sources = [source_of(value) or b"" for value in table.rows.select(rows)[column]]
    results = job.run(sources, [0] * len(rows), functools.partial(_of_files, decode, of_batch))
    broken = {row: result for row, result in zip(rows, results, strict=True) if isinstance(result, str)}
    leave_out(kind, table, broken, policy, count, job.notes)
    return job.spread(rows, [None if isinstance(result, str) else result for result in results])


def _of_files(
    decode: Callable[[str | bytes], Any],
    of_batch: Callable[[list[Any]], Sequence[dict[str, Any]]],
    batch: list[str | bytes],
) -> list[dict[str, Any] | str]:
    """The predictions of a batch of files. For a file that can't be decoded, the reason as text."""
    found: list[dict[str, Any] | str] = []
    decoded = []
    for source in batch:
        try:
            decoded.append(decode(source))
            found.append({})
        except ValueError as error:
            found.append(str(error))
    results = iter(of_batch(decoded) if decoded else ())
    return [each if isinstance(each, str) else next(results) for each in found]
