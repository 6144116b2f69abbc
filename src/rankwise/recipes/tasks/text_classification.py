"""Text classification: one label for each text. With ``problem_type: regression``, one number for each text.

task: text-classification
data:
train: reviews.csv        # CSV, JSON lines, Parquet, a folder of class folders, or a hub name
text: review              # the column with the text
label: stars              # the column with the label
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rankwise.recipes.data.labels import label_names, label_numbers, label_words, too_many
from rankwise.recipes.data.rows import (
    DataSection,
    RowsRecipe,
    bad_rows,
    check_sources,
    hold_out,
    read_tables,
    rows_with_text,
    second_texts,
)
from rankwise.recipes.data.splits import shortest_first
from rankwise.recipes.data.tables import Table, quiet_datasets
from rankwise.recipes.details import confusion, scatter
from rankwise.recipes.errors import Problem, raise_problems, refusal
from rankwise.recipes.memory.batches import longest, text_batch
from rankwise.recipes.models import load_model, load_tokenizer, name_labels, padding_config, token_limit
from rankwise.recipes.tasks import Metric, TaskData
from rankwise.recipes.tasks.usage import pipeline_lines

if TYPE_CHECKING:
    from torch import Tensor

TASK_TYPE = "SEQ_CLS"


class TextData(DataSection):
    """The data section of text classification.

    Args:
        text: the column with the text.
        text_pair: the column with a second text, for tasks on pairs.
        label: the column with the label or the number.
        labels: the names of the labels, by number. None: the labels in the training data, sorted.
        max_length: the most tokens to read of a text, 4 or more. None: as many as the model takes.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: list[str | int] | None = Field(default=None, min_length=2)
    max_length: int | None = Field(default=None, ge=4)

    @property
    def columns(self) -> dict[str, str]:
        """The names of the columns, by their keys in the recipe."""
        names = {"data.text": self.text, "data.text_pair": self.text_pair, "data.label": self.label}
        return {key: name for key, name in names.items() if name is not None}


class Recipe(RowsRecipe):
    """A recipe for text classification.

    Args:
        task: ``text-classification``.
        problem_type: ``classification``, or ``regression`` for a column of numbers.
        data: the section about the examples.
    """

    task: Literal["text-classification"]
    problem_type: Literal["classification", "regression"] = "classification"
    data: TextData

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number."""
        return self.problem_type == "regression"


# --- data --------------------------------------------------------------------------------------------------------


def check(recipe: Recipe) -> Iterator[Problem]:
    """The problems of a recipe: missing files, columns or model, or settings for labels in regression."""
    yield from check_sources(recipe)
    if recipe.is_regression and recipe.data.labels:
        yield Problem("data.labels", "is for classification; in regression the label is a number.")
    if recipe.is_regression and recipe.training.others.get("label_smoothing_factor"):
        yield Problem("training.label_smoothing_factor", "is for classification; a number can't be smoothed.")


def read_data(recipe: Recipe) -> TaskData:
    """Read all rows, check texts and labels, and hold out examples."""
    tables = read_tables(recipe)
    notes = [note for table in tables for note in table.notes]
    kept = [rows_with_text(table, recipe.data.text, notes) for table in tables]
    targets: list[Sequence[int | float]]
    names = None
    if recipe.is_regression:
        targets = [_numbers(recipe, table, rows) for table, rows in zip(tables, kept, strict=True)]
    else:
        words = [_words(recipe, table, rows) for table, rows in zip(tables, kept, strict=True)]
        names = label_names(recipe.data.labels, tables[0], recipe.data.label, words[0])
        targets = [
            label_numbers(table, rows, labels, names)
            for table, rows, labels in zip(tables, kept, words, strict=True)
        ]
    sets = [
        _examples(recipe, table, rows, target)
        for table, rows, target in zip(tables, kept, targets, strict=True)
    ]
    text = ["text", "text_pair"] if recipe.data.text_pair is not None else ["text"]
    label = None if recipe.is_regression else "labels"
    train, evaluation = hold_out(recipe.data, sets, notes, unique=text, label=label)
    return TaskData(train, evaluation, notes, names)


def _words(recipe: Recipe, table: Table, rows: Sequence[int]) -> list[str]:
    """The label of each row as text."""
    found = label_words(table, recipe.data.label, rows)
    if not recipe.data.labels and too_many(found) and all(map(_is_number, found)):
        message = f"{table.place.name} has {len(set(found))} different numbers in {recipe.data.label!r}."
        raise refusal("data.label", f"{message} To learn numbers, set problem_type: regression.")
    return found


def _numbers(recipe: Recipe, table: Table, rows: Sequence[int]) -> list[float]:
    """The number of each row in regression."""
    column = table.rows[recipe.data.label]
    bad = [row for row in rows if not _is_number(column[row])]
    name = recipe.data.label
    raise_problems(
        bad_rows("data.label", table, bad, lambda row: f"{name!r} is not a number: {column[row]!r:.50}")
    )
    return [float(column[row]) for row in rows]


def _examples(recipe: Recipe, table: Table, rows: Sequence[int], targets: Sequence[int | float]) -> Any:
    """A dataset with the columns ``text``, ``text_pair`` (if asked for) and ``labels``."""
    import datasets

    kept = table.rows.select(rows)
    columns = {"text": kept[recipe.data.text], "labels": targets}
    if recipe.data.text_pair is not None:
        columns["text_pair"] = second_texts(table, recipe.data.text_pair, rows)
    return datasets.Dataset.from_dict({name: list(column) for name, column in columns.items()})


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


# --- model -------------------------------------------------------------------------------------------------------


def processor(recipe: Recipe) -> Any:
    """The model's tokenizer."""
    return load_tokenizer(recipe)


def new_model(recipe: Recipe, data: TaskData, processor: Any, *, weights: bool) -> Any:
    """The model with a new head for the data's labels."""
    config = padding_config(recipe, processor)
    if data.labels is None:
        config.num_labels, config.problem_type = 1, "regression"
    else:
        name_labels(config, data.labels)
        config.problem_type = "single_label_classification"
    return load_model(recipe, "AutoModelForSequenceClassification", config, weights=weights)


def largest_batch(recipe: Recipe, config: Any) -> Mapping[str, Tensor]:
    """A batch of texts with ``data.max_length`` tokens, or with as many as the model takes."""
    size = recipe.training.per_device_train_batch_size
    labels = "numbers" if recipe.is_regression else "classes"
    return text_batch(size, longest(recipe.data.max_length, config), labels)


def trainer_arguments(
    recipe: Recipe, data: TaskData, processor: Any, model: Any
) -> tuple[dict[str, Any], list[str]]:
    """The tokens and the metrics. The trainer pads tokens batch by batch."""
    length = token_limit(recipe.data.max_length, processor, model.config)
    train, cut_in_train = _tokens(data.train, processor, length)
    evaluation, cut_in_evaluation = _tokens(data.evaluation, processor, length)
    cut, all_rows = cut_in_evaluation, len(evaluation)
    if not recipe.data._nothing_trains:
        cut, all_rows = cut + cut_in_train, all_rows + len(train)
    notes = (
        [f"{cut:,} of {all_rows:,} texts reach {length} tokens; the rest of each is not read."] if cut else []
    )
    return {
        "train_dataset": train,
        "eval_dataset": shortest_first(evaluation),
        "processing_class": processor,
        "compute_metrics": regression_metrics if recipe.is_regression else classification_metrics,
    }, notes


def _tokens(rows: Any, tokenizer: Any, length: int) -> tuple[Any, int]:
    """The tokens of texts, and the number of texts that fill the whole length."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pair = [batch["text_pair"]] if "text_pair" in batch else []
        encoded = tokenizer(batch["text"], *pair, truncation=True, max_length=length)
        return {**encoded, "labels": batch["labels"]}

    with quiet_datasets():
        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, keep_in_memory=True)
    return encoded, sum(len(ids) >= length for ids in encoded["input_ids"])


# --- results -----------------------------------------------------------------------------------------------------


def metrics(recipe: Recipe) -> Sequence[Metric]:
    """Accuracy, macro F1 and loss; in regression, squared error and correlations."""
    if recipe.is_regression:
        return (
            Metric("mse", "mean squared error", greater_is_better=False),
            Metric("pearson", "Pearson"),
            Metric("spearman", "Spearman"),
        )
    return (
        Metric("accuracy", "accuracy", ".2%"),
        Metric("macro_f1", "macro F1"),
        Metric("loss", "held-out loss", greater_is_better=False),
    )


def classification_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy and macro F1. Macro F1 averages over the labels that occur or are predicted.

    Args:
        prediction: the trainer's ``predictions``, shape (n, labels), and ``label_ids``, shape (n,).
    """
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score

    guess, truth = np.argmax(_values(prediction), axis=-1), np.asarray(prediction.label_ids)
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "macro_f1": float(f1_score(truth, guess, average="macro")),
    }


def regression_metrics(prediction: Any) -> dict[str, float]:
    """The mean squared error and the correlations. A correlation is 0 if either side is constant.

    Args:
        prediction: the trainer's ``predictions`` and ``label_ids``, n numbers each.
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
    """The model's output or, if it has several, its first one."""
    values = prediction.predictions
    return values[0] if isinstance(values, tuple) else values


def details(recipe: Recipe, data: TaskData, processor: Any, examples: Any, prediction: Any) -> dict[str, Any]:
    """The confusion matrix, or true and predicted numbers, and the worst mistakes."""
    import numpy as np

    def text(at: int) -> str:
        return str(processor.decode(examples[at]["input_ids"], skip_special_tokens=True))

    if data.labels is None:
        truth, guess = (
            np.asarray(side, dtype=np.float64).reshape(-1).tolist()
            for side in (prediction.label_ids, _values(prediction))
        )
        return scatter(truth, guess, text)
    return label_details(data.labels, prediction, text)


def label_details(names: Sequence[str], prediction: Any, example: Callable[[int], str]) -> dict[str, Any]:
    """The confusion matrix and the worst mistakes, from logits of shape (n, labels) and labels of shape (n,)."""
    import numpy as np
    from scipy.special import softmax

    chances = softmax(np.asarray(_values(prediction), dtype=np.float64), axis=-1)
    return confusion(
        names,
        np.asarray(prediction.label_ids).tolist(),
        chances.argmax(-1).tolist(),
        chances.max(-1).tolist(),
        example,
    )


def usage(recipe: Recipe, data: TaskData, base: str, folder: str) -> str:
    """Python lines that classify a text with the saved adapter."""
    extra = ', function_to_apply="none"' if recipe.is_regression else ""
    model, tokenizer = "AutoModelForSequenceClassification", ("tokenizer", "AutoTokenizer")
    text = str(data.evaluation[0]["text"])[:60]
    return pipeline_lines("text-classification", model, tokenizer, base, folder, text, extra)
