"""The model card of an adapter: ``README.md`` with the header that the Hugging Face hub reads.

The last line of a card holds a checksum of all lines above it. If the checksum is right, rankwise wrote the card and
may replace it. A card that a person wrote or changed is left alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.files.atomic import write_file
from rankwise.run.summary import RankSummary

CARD_NAME = "README.md"
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_SIGNATURE = re.compile(r"\n<!-- rankwise wrote this card \(([0-9a-f]{16})\)[^\n]*-->\n?\Z")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


@dataclass(frozen=True)
class CardMetric:
    """A metric for the card.

    Args:
        key: the metric's name on the hub, such as ``accuracy``.
        title: the metric's name for people.
        value: the adapter's value.
        shown: the adapter's value as text for people.
        before: the value before training as text for people; empty if it is unknown.
    """

    key: str
    title: str
    value: float
    shown: str
    before: str = ""


@dataclass(frozen=True)
class Training:
    """The part of a card that tells how an adapter was trained.

    Args:
        pipeline_tag: the hub's name of the task, if the adapter's configuration does not give it.
        data: the data that the metrics were measured on, in words for people; never a path on this machine.
        datasets: the names of the training datasets on the hub.
        metrics: the metrics that the adapter reached.
        settings: settings of the training, such as the learning rate.
    """

    pipeline_tag: str | None = None
    data: str = "held-out data"
    datasets: Sequence[str] = ()
    metrics: Sequence[CardMetric] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def adapter_card(
    config: LoraConfig,
    summary: RankSummary,
    model_class: str | None = None,
    num_labels: int | None = None,
    training: Training | None = None,
    tags: Sequence[str] = (),
    name: str = "adapter",
) -> str:
    """Write the text of an adapter's card. The license is left to the user.

    Args:
        config: the adapter's configuration.
        summary: the adapter's ranks.
        model_class: the Transformers class of the model that the adapter belongs to, if there is one.
        num_labels: the number of labels, for a classifier.
        training: how the adapter was trained, if that is known.
        tags: further tags for the hub.
        name: the model's name in the hub's table of results.

    Raises:
        ImportError: ``huggingface_hub``, which formats the header, is not installed.
    """
    from huggingface_hub import EvalResult, ModelCardData

    training = training or Training()
    base = base_on_hub(config)
    pipeline = training.pipeline_tag or _PIPELINES.get(str(config.task_type))
    method = "adalora" if isinstance(config, AdaLoraConfig) else "lora"
    results = [
        EvalResult(
            task_type=pipeline or "other", dataset_type=training.data, dataset_name=training.data,
            metric_type=metric.key, metric_name=metric.title, metric_value=metric.value,
        )
        for metric in training.metrics
    ]  # fmt: skip
    own_tags = ["rankwise", method, *([f"base_model:adapter:{base}"] if base else []), *tags]
    header = ModelCardData(
        base_model=base,
        library_name="peft",  # the format is PEFT's: the hub lists it among the base model's adapters
        pipeline_tag=pipeline,
        tags=list(dict.fromkeys(own_tags)),
        datasets=list(training.datasets) or None,
        metrics=[metric.key for metric in training.metrics if metric.key != "loss"] or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    body = _body(config, summary, method, base, model_class, num_labels, training)
    return signed(f"---\n{header.to_yaml()}\n---\n\n{body}\n")


def base_on_hub(config: LoraConfig) -> str | None:
    """The base model's name on the hub; None for a local folder, because its path is private."""
    name = config.base_model_name_or_path
    if not name or Path(name).exists() or not _HUB_NAME.fullmatch(name):
        return None
    return str(name)


def _body(
    config: LoraConfig,
    summary: RankSummary,
    method: str,
    base: str | None,
    model_class: str | None,
    num_labels: int | None,
    training: Training,
) -> str:
    kind = (
        "An AdaLoRA adapter, whose ranks were found in training," if method == "adalora" else "A LoRA adapter"
    )
    parts = [
        f"# Adapter for {base or 'a base model that is not on the hub'}",
        f"{kind} made with rankwise, in the format of PEFT. {summary.totals()}.",
        "## How to use it",
        _usage(base, model_class, num_labels),
    ]
    if training.metrics:
        rows = [
            f"| {metric.title} | {metric.before or '-'} | {metric.shown} |" for metric in training.metrics
        ]
        table = "\n".join(["| | before | after |", "| --- | ---: | ---: |", *rows])
        parts += ["## Results", f"On {training.data}:", table]
    if training.settings:
        parts += ["## Training", "\n".join(f"- {key}: {value}" for key, value in training.settings.items())]
    parts += [
        "## License",
        "Not specified yet: add `license: …` to the header of this file. The base model's license also applies.",
    ]
    return "\n\n".join(parts)


def _usage(base: str | None, model_class: str | None, num_labels: int | None) -> str:
    labels = f", num_labels={num_labels}" if num_labels is not None else ""
    if model_class is None:
        loaded = ["", "base = ...  # the model that the adapter was trained on"]
    else:
        name = repr(base or "PATH-OF-THE-BASE-MODEL")
        loaded = [f"from transformers import {model_class}", ""]
        loaded += [f"base = {model_class}.from_pretrained({name}{labels})"]
    lines = [
        "import rankwise as rw",
        *loaded,
        'model = rw.PeftModel.from_pretrained(base, "THIS-REPOSITORY")',
    ]
    code = "\n".join(["```python", *lines, "```"])
    return f"{code}\n\nPEFT's `PeftModel.from_pretrained` loads it, too."


# --- whether rankwise wrote a card ---------------------------------------------------------------------------------


def signed(text: str) -> str:
    """Append the line with the checksum, by which later changes are recognized."""
    rest = "change anything above, and it will never be overwritten"
    return f"{text}\n<!-- rankwise wrote this card ({_checksum(text)}): {rest} -->\n"


def is_own(text: str) -> bool:
    """Whether a card is unchanged since rankwise wrote it.

    Example:
        >>> card = signed("# An adapter")
        >>> is_own(card), is_own(card.replace("An adapter", "My adapter")), is_own("# By hand")
        (True, False, False)
    """
    found = _SIGNATURE.search(text)
    return found is not None and found[1] == _checksum(text[: found.start()])


def _checksum(text: str) -> str:
    # Editors and git may change line endings and add one at the end. That does not count as a change.
    return hashlib.sha256("\n".join(text.splitlines()).strip().encode()).hexdigest()[:16]


def write_card(folder: Path, text: str) -> bool:
    """Write a card into a folder, unless the folder holds a card that a person wrote or changed.

    Returns:
        Whether the card was written.

    Raises:
        OSError: the card can't be written.
    """
    path = folder / CARD_NAME
    if path.exists() or path.is_symlink():
        try:
            if not is_own(path.read_text(encoding="utf-8")):
                return False
        except (OSError, UnicodeDecodeError):
            return False
    write_file(path, text)
    return True
