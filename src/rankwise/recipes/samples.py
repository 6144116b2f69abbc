"""Samples: texts that a model writes before and after training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rankwise.recipes.tasks import TaskData, load_task

Sample = Mapping[str, Any]


def write_samples(recipe: Any, data: TaskData, processor: Any, model: Any) -> list[Sample]:
    """The samples of the recipe's task. Tasks without the function ``samples`` have none (see `Task`)."""
    samples = getattr(load_task(recipe.task), "samples", None)
    return [] if samples is None else list(samples(recipe, data, processor, model))


def before_and_after(before: Sequence[Sample], after: Sequence[Sample]) -> list[Sample]:
    """One sample for each prompt, with the texts written ``before`` and ``after`` training.

    Example:
        >>> before_and_after([{"prompt": "a", "written": "b"}], [{"prompt": "a", "written": "c"}])
        [{'prompt': 'a', 'before': 'b', 'after': 'c'}]
    """
    earlier = {sample["prompt"]: sample["written"] for sample in before}
    compared: list[Sample] = []
    for sample in after:
        rest = {key: value for key, value in sample.items() if key != "written"}
        compared.append({**rest, "before": earlier.get(sample["prompt"]), "after": sample["written"]})
    return compared


def sample_lines(samples: Sequence[Sample], most: int = 300) -> Iterator[str]:
    """The lines that show samples, one paragraph for each sample.

    Of a long prompt the lines show the end, of other long texts the beginning.

    Args:
        samples: the samples that `before_and_after` returned.
        most: the most characters to show of each text.
    """
    for sample in samples:
        yield ""
        for name in ("prompt", "expected", "before", "after"):
            text = " ".join(str(sample.get(name) or "").split())
            if name == "prompt" and len(text) > most:
                text = f"… {text[-most:]}"
            elif len(text) > most:
                text = f"{text[:most]} …"
            if name in sample:
                yield f"  {name:<10}{text}"
