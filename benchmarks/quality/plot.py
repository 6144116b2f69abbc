"""The held-out loss against the number of trained parameters, one curve for each method."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import results as saved
from results import Results

from report import LORA, OURS, of_the_default_before

_ABREAST = 3  # plots side by side
_LOOKS = {
    LORA: ("PEFT LoRA", "o", "#0072b2"),
    "PEFT LoRA, 4 times the rank, cut at the end": ("PEFT LoRA, cut at the end", "s", "#999999"),
    "PEFT EVA": ("PEFT EVA", "^", "#009e73"),
    "PEFT LoRA-GA": ("PEFT LoRA-GA", "v", "#cc79a7"),
    "PEFT rsLoRA": ("PEFT rsLoRA", "P", "#56b4e9"),
    "PEFT AdaLoRA": ("PEFT AdaLoRA", "X", "#e69f00"),
    OURS: ("rankwise", "D", "#d55e00"),
}  # colours that the colour-blind can tell apart (Okabe and Ito)


def draw(found: Results, seed: int, file: Path) -> None:
    """Draw all tasks in which a method is tuned at two ranks or more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    found = of_the_default_before(found)
    curves = {task: _curves(found, task, seed) for task in dict.fromkeys(run.task for run in found)}
    shown = [
        task
        for task, own in curves.items()
        if {LORA, OURS} <= set(own) and any(len(p) > 1 for p in own.values())
    ]
    rows = math.ceil(len(shown) / _ABREAST)
    size = (4 * _ABREAST, 3.2 * rows)
    figure, axes = plt.subplots(rows, _ABREAST, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for task, axis in zip(shown, axes.flat):  # noqa: B905 - there may be more places than tasks
        for method, points in curves[task].items():
            label, marker, colour = _LOOKS[method]
            axis.errorbar(*zip(*points, strict=True), marker=marker, color=colour, label=label, capsize=3)
        axis.set(title=task, xscale="log", xlabel="trained parameters", ylabel="held-out loss")
        axis.xaxis.set_minor_formatter(NullFormatter())  # else they overlap
        axis.grid(alpha=0.3)
    handles = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(file, dpi=110)


def _curves(found: Results, task: str, seed: int) -> dict[str, list[tuple[float, float, float]]]:
    """For each method its points: parameters, mean loss, standard error."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for method in _LOOKS:
        for rank in sorted({run.rank for run in found if (run.task, run.method) == (task, method)}):
            losses = saved.at_best(found, task, method, rank, seed)
            if losses:
                parameters = saved.parameters_at_best(found, task, method, rank, seed)
                point = (parameters, statistics.mean(losses), saved.error(losses))
                curves.setdefault(method, []).append(point)
    return curves
