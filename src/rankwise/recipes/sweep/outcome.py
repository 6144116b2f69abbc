"""The result of a sweep: its trials, the frontier of loss against parameters, and the smallest good adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

NAMES = {"adalora": "AdaLoRA", "lora": "LoRA"}


@dataclass(frozen=True)
class Point:
    """A trial of a sweep.

    Args:
        name: the name of the trial, and of its folder in the sweep's ``trials``.
        method: ``adalora`` or ``lora``.
        values: the values of the varied keys.
        state: ``complete``, ``pruned``, ``failed`` or ``running``.
        value: the value of the metric, or None. For a pruned trial, the last value before it was stopped.
        parameters: the number of parameters that the adapter keeps. None: the trial is not complete.
        seconds: the time that the trial took, in seconds. None: it is still running.
        reason: the reason why the trial failed. None: it did not fail.
    """

    name: str
    method: str
    values: Mapping[str, Any]
    state: str
    value: float | None
    parameters: int | None
    seconds: float | None
    reason: str | None = None

    @property
    def counts(self) -> bool:
        """Whether the trial is complete, with a result that can be compared."""
        return (
            self.state == "complete"
            and self.parameters is not None
            and self.value is not None
            and math.isfinite(self.value)
        )


@dataclass(frozen=True)
class Outcome:
    """The result of a sweep.

    Args:
        folder: the sweep's folder.
        metric: the key of the metric that compares trials.
        title: the metric's name to show.
        style: the format specification of the metric's values.
        grows: whether larger values of the metric are better.
        within: the share of the best value, from 0 to below 1, by which a smaller adapter may be worse.
        points: all trials.
        interrupted: the number of the signal that stopped the sweep, or None.

    Example:
        >>> points = [
        ...     Point("adalora-0", "adalora", {"adapter.target_r": 4}, "complete", 0.500, 40_000, 60.0),
        ...     Point("adalora-1", "adalora", {"adapter.target_r": 2}, "complete", 0.504, 20_000, 60.0),
        ... ]
        >>> outcome = Outcome(Path("sweep"), "loss", "held-out loss", ".4f", False, 0.01, points)
        >>> outcome.best().name, outcome.smallest.name
        ('adalora-0', 'adalora-1')
    """

    folder: Path
    metric: str
    title: str
    style: str
    grows: bool
    within: float
    points: Sequence[Point]
    interrupted: int | None = None

    def best(self, method: str | None = None) -> Point | None:
        """The best trial of a method, or of all methods. Among equals, the smallest. None: no trial is complete."""
        of = [point for point in self.points if point.counts and method in (None, point.method)]
        return min(of, key=lambda point: (self._loss(point), point.parameters), default=None)

    @property
    def smallest(self) -> Point | None:
        """The trial with the fewest parameters whose value is within the tolerance of the best."""
        best = self.best()
        if best is None:
            return None
        most = self._loss(best) + self.within * abs(self._loss(best))
        enough = [point for point in self.points if point.counts and self._loss(point) <= most]
        return min(enough, key=lambda point: (point.parameters, self._loss(point)))

    @property
    def frontier(self) -> list[Point]:
        """The trials that no trial with as few or fewer parameters beats, the smallest first."""
        counted = [point for point in self.points if point.counts]
        found: list[Point] = []
        for point in sorted(counted, key=lambda each: (each.parameters, self._loss(each))):
            if not found or self._loss(point) < self._loss(found[-1]):
                found.append(point)
        return found

    @property
    def kept(self) -> list[Point]:
        """The trials whose adapters are kept: the frontier, and the best of each method."""
        best = [self.best(method) for method in dict.fromkeys(point.method for point in self.points)]
        names = dict.fromkeys(point.name for point in [*self.frontier, *best] if point is not None)
        return [point for point in self.points if point.name in names]

    def _loss(self, point: Point) -> float:
        value = math.inf if point.value is None else point.value
        return -value if self.grows else value

    def to_dict(self) -> dict[str, Any]:
        """The result as data for JSON, which `rankwise report` reads."""
        best, smallest = self.best(), self.smallest
        return {
            "metric": self.metric,
            "title": self.title,
            "style": self.style,
            "greater_is_better": self.grows,
            "within": self.within,
            "trials": [
                {**asdict(point), "value": point.value if _is_finite(point.value) else None}
                for point in self.points
            ],
            "frontier": [point.name for point in self.frontier],
            "kept": [point.name for point in self.kept],
            "best": best and best.name,
            "best_by_method": {
                method: found.name
                for method in dict.fromkeys(point.method for point in self.points)
                if (found := self.best(method)) is not None
            },
            "smallest": smallest and smallest.name,
        }

    # --- showing it --------------------------------------------------------------------------------------------------

    def table(self, running: Mapping[str, str] | None = None, most: int | None = None) -> Table:
        """The trials as a table of ``rich``: running trials first, then the best ones.

        Args:
            running: the progress of each running trial, as text, by the trial's name.
            most: the number of rows to show. None: all.
        """
        from rich.table import Table

        keys = list(dict.fromkeys(key for point in self.points for key in point.values))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("trial", no_wrap=True)
        for title in (*(key.rpartition(".")[2] for key in keys), self.title, "parameters", "time"):
            table.add_column(title, justify="right")
        table.add_column("", overflow="fold")
        frontier = {point.name for point in self.frontier}
        best, smallest = self.best(), self.smallest
        order = {"complete": 0, "pruned": 1, "failed": 2, "running": -1}
        ranked = sorted(self.points, key=lambda point: (order[point.state], self._loss(point)))
        for point in ranked[:most]:
            said = [] if point.state == "complete" else [(running or {}).get(point.name, point.state)]
            said += ["best"] * (point is best) + ["frontier"] * (point.name in frontier)
            said += [f"smallest within {100 * self.within:g} %"] * (point is smallest and point is not best)
            said += [point.reason] if point.reason else []
            table.add_row(
                point.name,
                *(_shown(point.values.get(key)) for key in keys),
                "" if not _is_finite(point.value) else format(point.value, self.style),
                "" if point.parameters is None else f"{point.parameters:,}",
                "" if point.seconds is None else f"{point.seconds:.0f} s",
                ", ".join(said),
                style="bold" if point is best else "" if point.counts else "dim",
            )
        return table

    def lines(self) -> Iterator[str]:
        """The result in sentences."""
        best, smallest = self.best(), self.smallest
        if best is None or smallest is None:
            yield "No trial was trained to its end."
            return
        methods = list(dict.fromkeys(point.method for point in self.points))
        for method in methods:
            found = self.best(method)
            if found is not None:
                yield f"Best of {NAMES[method]}: {self._said(found)}"
        if smallest is not best:
            yield f"Smallest within {100 * self.within:g} % of the best: {self._said(smallest)}"
        else:
            yield f"No smaller adapter is within {100 * self.within:g} % of the best."

    def _said(self, point: Point) -> str:
        values = ", ".join(f"{key.rpartition('.')[2]} {_shown(value)}" for key, value in point.values.items())
        return f"{self.title} {point.value:{self.style}} with {point.parameters:,} parameters ({values}): {point.name}"


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shown(value: Any) -> str:
    """A value as text.

    Example:
        >>> _shown(0.00123456), _shown(8), _shown(None), _shown("cosine")
        ('0.00123', '8', '', 'cosine')
    """
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
