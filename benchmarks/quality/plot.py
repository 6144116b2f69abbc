"""The held-out loss against the number of trained parameters on natural tasks where rank is scarce, for each method."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import results as saved
from results import Results

from report import CEILINGS, LORA, NATURAL, OURS, UNTUNED_RANK, at_best_tried

_LOOKS = {
    LORA: ("PEFT LoRA", "o", "#0072b2"),
    "PEFT LoRA, without query and key": ("LoRA without query and key", "P", "#56b4e9"),
    "PEFT LoRA, the MLP only": ("LoRA, the MLP only", "^", "#009e73"),
    "PEFT DoRA": ("DoRA", "v", "#cc79a7"),
    "PEFT PiSSA": ("PiSSA", "s", "#999999"),
    "PEFT LoRA+": ("LoRA+", "*", "#000000"),
    "PEFT AdaLoRA": ("PEFT AdaLoRA", "X", "#e69f00"),
    OURS: ("rankwise", "D", "#d55e00"),
}  # colours that the colour-blind can tell apart (Okabe and Ito)


def draw(found: Results, seed: int, file: Path) -> None:
    """Draw the natural tasks in which both LoRA and rankwise have been tried."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    shown = [task for task in NATURAL if {LORA, OURS} <= {run.method for run in found if run.task == task}]
    size = (3.6 * len(shown), 3.8)
    figure, axes = plt.subplots(1, len(shown), figsize=size, squeeze=False, layout="constrained")
    for task, axis in zip(shown, axes.flat, strict=True):
        for method, (label, marker, colour) in _LOOKS.items():
            points = list(_points(found, task, method, seed))
            if points:
                axis.errorbar(*zip(*points, strict=True), marker=marker, color=colour, label=label, capsize=3)
        for _, loss, _ in _points(found, task, CEILINGS[1], seed):
            axis.axhline(loss, color="black", linestyle=":", label=CEILINGS[1])
        axis.set(title=task, xscale="log", xlabel="trained parameters", ylabel="held-out loss")
        axis.xaxis.set_minor_formatter(NullFormatter())  # else they overlap
        axis.grid(alpha=0.3)
    handles = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)
    figure.savefig(file, dpi=110)


def _points(found: Results, task: str, method: str, seed: int) -> Iterator[tuple[float, float, float]]:
    """Parameters, mean loss and standard error at each rank below the untuned one, at the best rate that was tried."""
    ranks = {run.rank for run in found if (run.task, run.method) == (task, method)}
    for rank in sorted(rank for rank in ranks if rank < UNTUNED_RANK):
        losses = at_best_tried(found, task, method, rank, seed)
        rows = [row for run, row in found.items() if (run.task, run.method, run.rank) == (task, method, rank)]
        parameters = statistics.mean(row["parameters"] for row in rows)
        yield parameters, statistics.mean(losses), saved.error(losses) if len(losses) > 1 else 0.0
