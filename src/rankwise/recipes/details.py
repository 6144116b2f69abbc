"""What is behind a task's metrics: which labels are taken for which, the worst mistakes, numbers side by side, words.

A task gives them with its function ``details``; they go into ``results.json``, into `evaluate`, and onto the page of a
report. Which kind it is says ``kind``: ``confusion``, ``scatter`` or ``words``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.recipes.tasks import TaskData, load_task

MISTAKES = 10  # that are listed
_POINTS = 500  # of a scatter plot
LONGEST = 200  # characters of an example that are shown
_TABLE = 12  # labels whose matrix a terminal shows whole

Details = Mapping[str, Any]


class Keep:
    """A trainer's ``compute_metrics`` that remembers what it was given last.

    Args:
        compute: the task's own.
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
    """The details of a task's predictions; None if the task has none.

    Args:
        recipe: the recipe.
        data: what was read of it.
        processor: the task's.
        examples: the examples that were predicted, in the order of ``prediction``.
        prediction: ``predictions`` and ``label_ids`` of a trainer; None if there is none.
    """
    make = getattr(load_task(recipe.task), "details", None)
    if make is None or prediction is None:
        return None
    found: dict[str, Any] = make(recipe, data, processor, examples, prediction)
    return found


def matrix(labels: Sequence[str], truth: Sequence[int], guess: Sequence[int]) -> dict[str, Any]:
    """Which labels are taken for which; arguments as for `confusion`."""
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
    """Which labels are taken for which, and the mistakes that the model was surest of.

    Args:
        labels: their names, by number.
        truth: the label of each example.
        guess: the label that was predicted.
        chances: how likely the model found what it predicted, from 0 to 1.
        example: what to show of an example, by its number.
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
    """True and predicted numbers side by side, and the examples on which they differ most."""
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
    """The words that are most often written wrong, and the worst transcripts; texts as the error rate compares them."""
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


# --- for people --------------------------------------------------------------------------------------------------


def lines(details: Details) -> Iterator[Any]:
    """What a terminal shows: tables of ``rich``, with their headings as text."""
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
        ValueError: these details have no picture, or matplotlib does not know the file's ending.
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
        raise ValueError("Of speech there is no picture: --plot is for labels and numbers.")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
