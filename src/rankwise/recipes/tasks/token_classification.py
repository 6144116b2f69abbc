"""Token classification: a tag for each word, such as the names of people and places.

task: token-classification
data:
train: entities.conll     # CoNLL, JSON lines, Parquet, or a hub name
tokens: tokens            # the column with lists of words
tags: ner_tags            # the column with a tag for each word
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rankwise.recipes.data.conll import is_conll, read_conll
from rankwise.recipes.data.labels import IGNORED
from rankwise.recipes.data.rows import (
    DataSection,
    RowsRecipe,
    TooLong,
    bad_rows,
    check_sources,
    count_rows,
    fitting_rows,
    hold_out,
    listed_rows,
    read_tables,
)
from rankwise.recipes.data.splits import shortest_first
from rankwise.recipes.data.tables import Table, column_problems, read_table
from rankwise.recipes.details import LONGEST, MISTAKES, matrix
from rankwise.recipes.errors import Problem, did_you_mean, raise_problems, refusal
from rankwise.recipes.memory.batches import longest, text_batch
from rankwise.recipes.models import (
    load_model,
    load_processor,
    load_tokenizer,
    model_config,
    name_labels,
    padding_config,
    token_limit,
)
from rankwise.recipes.places import Place
from rankwise.recipes.preparing import tracked
from rankwise.recipes.tasks import Metric, TaskData
from rankwise.recipes.tasks.usage import pipeline_lines

if TYPE_CHECKING:
    from torch import Tensor

TASK_TYPE = "TOKEN_CLS"
_ENTITY_TAG = re.compile(r"[BIES]-.+")


class TaggedData(DataSection):
    """The data section of token classification.

    Args:
        train: the training examples: a CoNLL file (``.conll``, ``.iob``, ``.bio``), a JSON lines or Parquet file, or a
            hub dataset's name. In a CoNLL file, each line has a word and, in its last column, a tag. A blank line ends
            a sentence.
        tokens: the column with lists of words. A CoNLL file needs no names of columns.
        tags: the column with lists of tags, one for each word.
        labels: the names of the tags, by number. Tags in the data may be these numbers. None: the tags in the training
            data, ``O`` first.
        max_length: the most tokens to read of a sentence, 4 or more. None: as many as the model takes.
        too_long: how to treat longer sentences: ``truncate`` them, ``drop`` them, or raise an ``error``.
    """

    tokens: str = "tokens"
    tags: str = "tags"
    labels: list[str] | None = Field(default=None, min_length=2)
    max_length: int | None = Field(default=None, ge=4)
    too_long: TooLong = "truncate"

    @property
    def columns(self) -> dict[str, str]:
        """The names of the columns, by their keys in the recipe."""
        return {"data.tokens": self.tokens, "data.tags": self.tags}


class Recipe(RowsRecipe):
    """A recipe for token classification.

    Args:
        task: ``token-classification``.
        data: the section about the words and tags.
    """

    task: Literal["token-classification"]
    data: TaggedData


# --- data --------------------------------------------------------------------------------------------------------


def check(recipe: Recipe) -> Iterator[Problem]:
    """The problems of a recipe: missing files, columns or model, or repeated labels."""
    yield from check_sources(recipe, _place_problems)
    labels = recipe.data.labels or []
    if twice := next((name for name in labels if labels.count(name) > 1), None):
        yield Problem("data.labels", f"{twice!r} appears twice.")


def _place_problems(place: Place, key: str, columns: dict[str, str]) -> Iterator[Problem]:
    return iter(()) if is_conll(place) else column_problems(place, key, columns)


def _read(place: Place, key: str, columns: Sequence[str], split: str, subset: str | None) -> Table:
    if is_conll(place):
        return read_conll(place, key, *columns)
    return read_table(place, key, columns, split, subset)


def read_data(recipe: Recipe) -> TaskData:
    """Read all sentences, check words and tags, split words into tokens, and hold out sentences."""
    data, tokenizer = recipe.data, processor(recipe)
    limit = token_limit(data.max_length, tokenizer, model_config(recipe))
    tables = read_tables(recipe, _read)
    notes = [note for table in tables for note in table.notes]
    kept = [_rows_with_words(data, table, notes) for table in tables]
    tags = [_words_of_tags(data, table, rows) for table, rows in zip(tables, kept, strict=True)]
    names = list(data.labels or _tag_names(tables[0], tags[0].values()))
    if has_entities(names) and importlib.util.find_spec("seqeval") is None:
        raise refusal(
            "task", 'measuring entities needs the package seqeval. Install it: pip install ".[language]"'
        )
    sets = [
        _tokens(data, tokenizer, limit, table, _numbers(table, each, names), notes)
        for table, each in zip(tables, tags, strict=True)
    ]
    train, evaluation = hold_out(data, sets, notes, unique=["input_ids"])
    return TaskData(train, evaluation, notes, names)


def _rows_with_words(data: TaggedData, table: Table, notes: list[str]) -> list[int]:
    """The numbers of the rows with words. A note says which empty rows are left out.

    Raises:
        RecipeError: a row has not as many tags as words, or no row has words.
    """
    wrong: dict[int, str] = {}
    empty = []
    for row, (words, tags) in enumerate(zip(table.rows[data.tokens], table.rows[data.tags], strict=True)):
        if not words and not tags:
            empty.append(row)
        elif not _is_list_of(words, str):
            wrong[row] = f"{data.tokens!r}: a list of words is expected, but it holds {words!r:.50}"
        elif not _is_list_of(tags, (str, int)):
            wrong[row] = f"{data.tags!r}: a list of tags is expected, but it holds {tags!r:.50}"
        elif len(words) != len(tags):
            wrong[row] = f"has {len(words)} words and {len(tags)} tags"
    raise_problems(bad_rows("data.tags", table, list(wrong), lambda row: wrong[row]))
    if len(empty) == len(table.rows):
        raise refusal("data.tokens", f"no row of {table.place.name} has words in {data.tokens!r}.")
    if empty:
        notes.append(f"{count_rows(len(empty))} without words left out ({listed_rows(table, empty)}).")
    return sorted(set(range(len(table.rows))) - set(empty))


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _words_of_tags(data: TaggedData, table: Table, rows: Sequence[int]) -> dict[int, list[str]]:
    """The names of each row's tags. Tags that are numbers get their names from the dataset or from the recipe."""
    column = table.rows[data.tags]
    feature = getattr(table.rows.features[data.tags], "feature", None)
    names = getattr(feature, "names", None) or data.labels
    found: dict[int, list[str]] = {}
    wrong: dict[int, int] = {}
    for row in rows:
        for tag in column[row]:
            if names and isinstance(tag, int) and not 0 <= tag < len(names):
                wrong[row] = tag
        if row not in wrong:
            found[row] = [names[tag] if names and isinstance(tag, int) else str(tag) for tag in column[row]]
    raise_problems(
        bad_rows("data.tags", table, list(wrong), lambda row: f"has the tag {wrong[row]}, which has no name")
    )
    return found


def _tag_names(table: Table, tags: Iterable[Sequence[str]]) -> list[str]:
    """The tags in the data, sorted by the kind of entity: ``O``, then ``B-LOC``, ``I-LOC``, ``B-PER`` and so on."""
    found = {tag for row in tags for tag in row}
    if len(found) < 2:
        raise refusal(
            "data.tags", f"{table.place.name} has only the tag {next(iter(found))!r}: two are needed."
        )
    if all(tag.isdecimal() for tag in found):
        return sorted(found, key=int)
    return sorted(found, key=lambda tag: (tag != "O", tag.partition("-")[2], tag))


def _numbers(table: Table, tags: Mapping[int, Sequence[str]], names: Sequence[str]) -> dict[int, list[int]]:
    """The numbers of each row's tags."""
    number = {name: i for i, name in enumerate(names)}
    unknown = {row: tag for row, each in tags.items() for tag in reversed(each) if tag not in number}
    raise_problems(
        bad_rows(
            "data.tags",
            table,
            list(unknown),
            lambda row: f"has the unknown tag {unknown[row]!r}. {did_you_mean(unknown[row], names)}",
        )
    )
    return {row: [number[tag] for tag in each] for row, each in tags.items()}


def _tokens(
    data: TaggedData,
    tokenizer: Any,
    limit: int,
    table: Table,
    tags: Mapping[int, Sequence[int]],
    notes: list[str],
) -> Any:
    """A dataset with the tokens of sentences, and the label of each word at the word's first token."""
    import datasets

    column = table.rows[data.tokens]
    ids, labels, long = {}, {}, []
    for row in tracked(tags, "splitting words into tokens", len(tags)):
        encoded = tokenizer(column[row], is_split_into_words=True, truncation=True, max_length=limit)
        words = encoded.word_ids()
        ids[row] = encoded["input_ids"]
        labels[row] = labels_of_tokens(words, tags[row])
        if max((word for word in words if word is not None), default=-1) < len(tags[row]) - 1:
            long.append(row)
    rows = fitting_rows(data.too_long, table, list(tags), long, f"{limit:,} tokens", notes)
    return datasets.Dataset.from_dict(
        {"input_ids": [ids[row] for row in rows], "labels": [labels[row] for row in rows]}
    )


def labels_of_tokens(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """The labels of tokens: the word's tag at the first token of each word, `IGNORED` elsewhere.

    Args:
        words: the number of each token's word, or None for tokens outside words.
        tags: the number of each word's tag.

    Example:
        >>> labels_of_tokens([None, 0, 1, 1, None], tags=[7, 8])
        [-100, 7, 8, -100, -100]
    """
    before = [None, *words]
    return [
        IGNORED if word is None or word == last else tags[word]
        for word, last in zip(words, before, strict=False)
    ]


# --- model -------------------------------------------------------------------------------------------------------


def processor(recipe: Recipe) -> Any:
    """The model's tokenizer, which can tell the word of each token.

    Raises:
        RecipeError: the tokenizer can't tell the words.
    """
    tokenizer = load_tokenizer(recipe)
    if not tokenizer.is_fast:
        message = "its tokenizer is a slow one, which can't tell the words that its tokens belong to."
        raise refusal("model", f"{message} Take a model with a tokenizer.json.")
    if getattr(tokenizer, "add_prefix_space", None) is False:
        # For tokenizers such as RoBERTa's, a word alone differs from the same word after a space.
        tokenizer = load_processor(recipe, "AutoTokenizer", add_prefix_space=True)
    return tokenizer


def new_model(recipe: Recipe, data: TaskData, processor: Any, *, weights: bool) -> Any:
    """The model with a new head for the data's tags."""
    config = padding_config(recipe, processor)
    name_labels(config, data.labels or ())
    return load_model(recipe, "AutoModelForTokenClassification", config, weights=weights)


def largest_batch(recipe: Recipe, config: Any) -> Mapping[str, Tensor]:
    """A batch of sentences with ``data.max_length`` tokens, or with as many as the model takes."""
    return text_batch(recipe.training.per_device_train_batch_size, longest(recipe.data.max_length, config))


def trainer_arguments(
    recipe: Recipe, data: TaskData, processor: Any, model: Any
) -> tuple[dict[str, Any], list[str]]:
    """The tokens and the metrics. The trainer pads tokens batch by batch."""
    from transformers import DataCollatorForTokenClassification

    names = list(data.labels or ())
    notes = []
    if not has_entities(names):
        notes = ["The tags do not mark entities (B-…, I-…), so only accuracy is measured."]
    return {
        "train_dataset": data.train,
        "eval_dataset": shortest_first(data.evaluation),
        "processing_class": processor,
        "data_collator": DataCollatorForTokenClassification(processor),
        "compute_metrics": functools.partial(tag_metrics, names),
        "preprocess_logits_for_metrics": _likeliest,
    }, notes


def _likeliest(logits: Any, labels: Tensor) -> Any:
    """The predicted tags. The metrics need nothing else of the logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


# --- results -----------------------------------------------------------------------------------------------------


def metrics(recipe: Recipe) -> Sequence[Metric]:
    """F1, precision and recall of whole entities, accuracy of words, and loss."""
    return (
        Metric("f1", "entity F1", ".2%"),
        Metric("precision", "entity precision", ".2%"),
        Metric("recall", "entity recall", ".2%"),
        Metric("accuracy", "accuracy of words", ".2%"),
        Metric("loss", "held-out loss", greater_is_better=False),
    )


def has_entities(names: Sequence[str]) -> bool:
    """Whether all tags are ``O`` or mark entities by ``B-`` (begin), ``I-`` (inside), ``E-`` (end) or ``S-`` (single).

    Example:
        >>> has_entities(["O", "B-PER", "I-PER"]), has_entities(["NOUN", "VERB"])
        (True, False)
    """
    return all(name == "O" or _ENTITY_TAG.fullmatch(name) for name in names)


def tag_metrics(names: Sequence[str], prediction: Any) -> dict[str, float]:
    """Accuracy and, if the tags mark entities, F1, precision and recall of entities.

    An entity counts as found if its kind, its first word and its last word are right, as in CoNLL's script.

    Args:
        names: the names of the tags, by number.
        prediction: the trainer's ``predictions`` and ``label_ids``, both of shape (n, length). Each label that is not
            `IGNORED` stands for a word.
    """
    import numpy as np

    guess, truth = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    is_word = truth != IGNORED
    found = {"accuracy": float((guess == truth)[is_word].mean())}
    if not has_entities(names):
        return found
    from seqeval.metrics import f1_score, precision_score, recall_score

    truths, guesses = (
        [[names[tag] for tag in row[mask]] for row, mask in zip(side, is_word, strict=True)]
        for side in (truth, guess)
    )
    for key, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        found[key] = float(score(truths, guesses, zero_division=0))
    return found


def details(recipe: Recipe, data: TaskData, processor: Any, examples: Any, prediction: Any) -> dict[str, Any]:
    """The confusion matrix of tags, and the sentences with the most wrong words."""
    import numpy as np

    guess, truth = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    is_word = truth != IGNORED
    wrong = ((guess != truth) & is_word).sum(axis=-1)
    names = list(data.labels or ())
    mistakes = [
        {
            "example": processor.decode(examples[int(at)]["input_ids"], skip_special_tokens=True)[:LONGEST],
            "truth": " ".join(names[tag] for tag in truth[at][is_word[at]])[:LONGEST],
            "predicted": " ".join(names[tag] for tag in guess[at][is_word[at]])[:LONGEST],
        }
        for at in np.argsort(-wrong, kind="stable")[:MISTAKES]
        if wrong[at]
    ]
    return {**matrix(names, truth[is_word].tolist(), guess[is_word].tolist()), "mistakes": mistakes}


def usage(recipe: Recipe, data: TaskData, base: str, folder: str) -> str:
    """Python lines that tag a text with the saved adapter."""
    extra = ', aggregation_strategy="first"' if has_entities(list(data.labels or ())) else ""
    text = processor(recipe).decode(data.evaluation[0]["input_ids"], skip_special_tokens=True)
    model, tokenizer = "AutoModelForTokenClassification", ("tokenizer", "AutoTokenizer")
    return pipeline_lines("token-classification", model, tokenizer, base, folder, text[:100], extra)
