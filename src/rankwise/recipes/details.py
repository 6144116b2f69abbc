"""Details behind a task's metrics: confusion matrices, true against predicted numbers, wrong words, worst mistakes.

A task's function ``details`` makes them. ``results.json``, `evaluate` and the page of a report show them. Their key
``kind`` is ``confusion``, ``scatter`` or ``words``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.recipes.tasks import TaskData, load_task
from rankwise.report.plots import write_figure

MISTAKES = 10  # the most mistakes that are listed
_POINTS = 500  # the most points in a scatter plot
LONGEST = 200  # the most characters of an example that are shown
_TABLE = 12  # the most labels whose matrix a terminal shows

Details = Mapping[str, Any]


class Keep:
    """A trainer's ``compute_metrics`` that remembers the last predictions.

    Args:
        compute: the task's ``compute_metrics``.
    """

    def __init__(self, compute: Callable[[Any], dict[str, float]]) -> None:
        self.compute = compute
        self.prediction: Any = None

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.prediction = prediction
        return self.compute(prediction)


def details_of(
    recipe: Any, data: TaskData, processor: Any, examples: Any, prediction: Any
) -> dict[str, Any] | None:
    """The details of a task's predictions. None: the task has no details, or there are no predictions.

    Args:
        recipe: the run's recipe.
        data: the data that the task read.
        processor: the task's tokenizer, feature extractor or image processor.
        examples: the predicted examples, in the order of ``prediction``.
        prediction: the trainer's ``predictions`` and ``label_ids``, or None.
    """
    make = getattr(load_task(recipe.task), "details", None)
    if make is None or prediction is None:
        return None
    found: dict[str, Any] = make(recipe, data, processor, examples, prediction)
    return found


def matrix(labels: Sequence[str], truth: Sequence[int], guess: Sequence[int]) -> dict[str, Any]:
    """The confusion matrix of labels. The arguments are those of `confusion`."""
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(truth, guess, labels=range(len(labels)))
    return {"kind": "confusion", "labels": list(labels), "matrix": counts.tolist()}


def confusion(
    labels: Sequence[str],
    truth: Sequence[int],
    guess: Sequence[int],
    chances: Sequence[float],
    example: Callable[[int], str],
) -> dict[str, Any]:
    """The confusion matrix of labels, and the mistakes with the highest probabilities.

    Args:
        labels: the labels' names, by number.
        truth: the true label's number of each example.
        guess: the predicted label's number of each example.
        chances: the probability of each predicted label, from 0 to 1.
        example: a function that returns the text to show for an example, by the example's number.
    """
    wrong = [at for at, (true, guessed) in enumerate(zip(truth, guess, strict=True)) if true != guessed]
    worst = sorted(wrong, key=lambda at: -chances[at])[:MISTAKES]
    return {
        **matrix(labels, truth, guess),
        "mistakes": [
            {
                "example": _short(example(at)),
                "truth": labels[truth[at]],
                "predicted": labels[guess[at]],
                "probability": round(float(chances[at]), 4),
            }
            for at in worst
        ],
    }


def scatter(truth: Sequence[float], guess: Sequence[float], example: Callable[[int], str]) -> dict[str, Any]:
    """True and predicted numbers, and the examples on which they differ most."""
    count = len(truth)
    shown = range(count) if count <= _POINTS else [at * count // _POINTS for at in range(_POINTS)]
    worst = sorted(range(count), key=lambda at: -abs(truth[at] - guess[at]))[:MISTAKES]
    return {
        "kind": "scatter",
        "truth": [round(float(truth[at]), 6) for at in shown],
        "predicted": [round(float(guess[at]), 6) for at in shown],
        "mistakes": [
            {
                "example": _short(example(at)),
                "truth": round(float(truth[at]), 6),
                "predicted": round(float(guess[at]), 6),
            }
            for at in worst
        ],
    }


def wrong_words(
    references: Sequence[str], guesses: Sequence[str], example: Callable[[int], str]
) -> dict[str, Any]:
    """The most frequent wrong words, and the worst transcripts. Texts are normalized as for the word error rate."""
    import jiwer

    told = [at for at, text in enumerate(references) if text.strip()]
    found = jiwer.process_words([references[at] for at in told], [guesses[at] for at in told])
    counts: Counter[tuple[str, str]] = Counter()
    errors: dict[int, int] = {}
    for at, own, said, parts in zip(told, found.references, found.hypotheses, found.alignments, strict=True):
        for part in parts:
            if part.type == "equal":
                continue
            before = own[part.ref_start_idx : part.ref_end_idx]
            after = said[part.hyp_start_idx : part.hyp_end_idx]
            width = max(len(before), len(after))
            errors[at] = errors.get(at, 0) + width
            padded = [(*before, *[""] * (width - len(before))), (*after, *[""] * (width - len(after)))]
            counts.update(zip(*padded, strict=True))
    worst = sorted(errors, key=lambda at: -errors[at])[:MISTAKES]
    return {
        "kind": "words",
        "wrong": [{"word": word, "instead": instead, "count": count}
                  for (word, instead), count in counts.most_common(MISTAKES * 2)],
        "mistakes": [{"example": _short(example(at)), "truth": _short(references[at]), "predicted": _short(guesses[at])}
                     for at in worst],
    }  # fmt: skip


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]} …"


def lines(details: Details) -> Iterator[Any]:
    """The tables that a terminal shows, as tables of ``rich``. Their headings are strings."""
    from rich.table import Table

    if details["kind"] == "confusion":
        labels, matrix = details["labels"], details["matrix"]
        if len(labels) <= _TABLE:
            table = _table("true label \\ predicted", *labels)
            for label, row in zip(labels, matrix, strict=True):
                table.add_row(label, *(str(count) if count else "·" for count in row))
            yield table
        pairs = sorted(
            ((count, labels[true], labels[guess]) for true, row in enumerate(matrix)
             for guess, count in enumerate(row) if count and true != guess), reverse=True,
        )  # fmt: skip
        if pairs:
            yield "\nTaken for another most often"
            table = _table("true label", "predicted", "how often")
            for count, true, guess in pairs[:MISTAKES]:
                table.add_row(true, guess, str(count))
            yield table
    if details["kind"] == "words" and details["wrong"]:
        yield "\nWords most often wrong"
        table = _table("said", "written", "how often")
        for each in details["wrong"]:
            table.add_row(each["word"] or "–", each["instead"] or "–", str(each["count"]))
        yield table
    if details["mistakes"]:
        yield "\nThe worst mistakes"
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in details["mistakes"][0]:
            table.add_column(name, overflow="fold")
        for each in details["mistakes"]:
            table.add_row(*(str(value) for value in each.values()))
        yield table


def _table(*names: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right")
    return table


def save_plot(details: Details, path: Path) -> None:
    """Draw a confusion matrix or a scatter plot with scikit-learn's displays.

    Raises:
        ValueError: these details have no picture, or matplotlib can't write files with this ending.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    from sklearn.metrics import ConfusionMatrixDisplay, PredictionErrorDisplay

    if details["kind"] == "confusion":
        count = len(details["labels"])
        figure, axes = plt.subplots(figsize=(max(4, 0.45 * count + 2), max(3.5, 0.45 * count + 1.5)))
        ConfusionMatrixDisplay(np.array(details["matrix"]), display_labels=details["labels"]).plot(
            ax=axes, xticks_rotation="vertical", colorbar=False, include_values=count <= 30
        )
    elif details["kind"] == "scatter":
        figure, axes = plt.subplots(figsize=(5, 5))
        PredictionErrorDisplay(y_true=np.array(details["truth"]), y_pred=np.array(details["predicted"])).plot(
            ax=axes, kind="actual_vs_predicted"
        )
    else:
        raise ValueError("Speech recognition has no picture: --plot is for labels and numbers.")
    figure.tight_layout()
    write_figure(figure, path, dpi=150)
    plt.close(figure)
