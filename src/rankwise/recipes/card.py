"""The facts about a run that its model card shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from rankwise.recipes.places import find_place
from rankwise.recipes.recipe import BaseRecipe
from rankwise.recipes.tasks import Metric
from rankwise.storage.card import CardMetric, Training

if TYPE_CHECKING:
    from rankwise.recipes.best import Best

# The hub's names, where they differ from rankwise's.
_PIPELINES = {"speech-recognition": "automatic-speech-recognition", "causal-lm": "text-generation"}
_METRICS = {"macro_f1": "f1", "pearson": "pearsonr", "spearman": "spearmanr"}


def card_of(
    recipe: BaseRecipe,
    metrics: Sequence[Metric],
    before: Mapping[str, float],
    after: Mapping[str, float],
    held_out: int,
    steps: int,
    best: Best | None = None,
) -> Training:
    """The facts for the card of a finished run. They contain no paths of this machine.

    Args:
        recipe: the run's recipe.
        metrics: the task's metrics, with their titles and formats.
        before: the values of the metrics before training, by key.
        after: the values of the metrics after training, by key.
        held_out: the number of held-out examples.
        steps: optimizer steps of the run.
        best: the evaluation of the adapter that was kept. None: the adapter of the last step was kept.
    """
    sources = {key: getattr(getattr(recipe, "data", None), key, None) for key in ("train", "evaluation")}
    places = [find_place(name, "data", recipe.folder) for name in sources.values() if name is not None]
    measured = [
        CardMetric(
            key=_METRICS.get(metric.key, metric.key),
            title=metric.title,
            value=after[metric.key],
            shown=format(after[metric.key], metric.style),
            before=format(before[metric.key], metric.style) if metric.key in before else "",
        )
        for metric in metrics
        if math.isfinite(after.get(metric.key, math.nan))
    ]
    own = recipe.training
    batch = own.per_device_train_batch_size * own.gradient_accumulation_steps
    settings = {
        "method": recipe.method,
        "optimizer steps": f"{steps:,}",
        **({} if best is None else {"kept from step": f"{best.step:,}, which has the best {best.metric}"}),
        "examples in a step": f"{batch:,} for each process",
        "learning rate": f"{own.learning_rate:g}, {own.lr_scheduler_type}",
        "optimizer": own.optim,
        "seed": own.seed,
    }
    shown = [place.name if place.path is None else PurePath(place.name).name for place in places]
    return Training(
        pipeline_tag=_PIPELINES.get(recipe.task, recipe.task),
        data=f"{held_out:,} held-out examples" + (f" of {shown[-1]}" if shown else ""),
        datasets=[place.name for place in places if place.path is None],
        metrics=measured,
        settings=settings,
    )
