"""What the results of the comparison say: tables, pairs of runs, how forgiving a method is, and what it saves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from results import Results, Run, at_best, best_rate, curve, error

LORA, OURS = "PEFT LoRA", "rankwise"
_ENOUGH = 8  # the rank of LoRA whose quality is to be had for fewer parameters


def tables(results: Results, seed: int) -> str:
    """Markdown: for each task and rank, every method at its best rate, and how much worse it is at half and double."""
    lines: list[str] = []
    for task, rank, mine in _cells(results):
        lines += [
            "", f"### {task}, average rank {rank:g}", "",
            "| method | parameters | best rate | loss | at half of it | at double | single runs |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for method in _methods(mine):
            losses = curve(results, task, method, rank, seed)
            if not losses:
                continue
            tuned = best_rate(results, task, method, rank, seed)
            best, inside = tuned or min(losses, key=losses.__getitem__), tuned is not None
            rows = [row for run, row in mine.items() if run.method == method and run.rate == best]
            found = [row["loss"] for row in rows]
            cells = [
                method,
                f"{round(statistics.mean(row['parameters'] for row in rows)):,}",
                f"{best:g}" if inside else f"{best:g} (the last one tried)",
                with_error(found),
                *(_at(losses, rate) for rate in (best / 2, 2 * best)),
                ", ".join(f"{loss:.4f}" for loss in found),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _at(losses: dict[float, float], rate: float) -> str:
    near = [loss for other, loss in losses.items() if math.isclose(rate, other, rel_tol=1e-6)]
    return f"{near[0]:.4f}" if near else "-"


def summary(results: Results, seed: int) -> str:
    """Markdown: LoRA, the best of the other methods, rankwise and LoRA of four times the rank, in each tuned cell.

    "Of the way" is how much of what four times the rank would give comes at the smaller budget. It is given where rank
    is scarce: where that is at least 5 % of LoRA's loss.
    """
    lines = [
        "| task | average rank | LoRA | best of the others | rankwise | LoRA, 4 times the rank | of the way |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, rank, mine in _cells(results):
        found = {method: at_best(results, task, method, rank, seed) for method in _methods(mine)}
        tuned = {method: losses for method, losses in found.items() if losses}
        if not {LORA, OURS} <= set(tuned):
            continue
        lora, ours = (statistics.mean(tuned[method]) for method in (LORA, OURS))
        others = {
            method: losses for method, losses in tuned.items() if method.startswith("PEFT") and method != LORA
        }
        best = min(others, key=lambda method: statistics.mean(others[method]), default=None)
        more = at_best(results, task, LORA, 4 * rank, seed)
        scarce = more and statistics.mean(more) <= 0.95 * lora
        way = f"{(lora - ours) / (lora - statistics.mean(more)):.0%}" if scarce else "-"
        cells = [
            task, f"{rank:g}", with_error(tuned[LORA]),
            f"{with_error(others[best])}, {best.removeprefix('PEFT ')}" if best else "-",
            with_error(tuned[OURS]), with_error(more) if more else "-", way,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against(results: Results, ours: str, theirs: str, seed: int) -> tuple[list[float], str]:
    """The differences of the held-out loss, theirs minus ours, of all pairs of runs, each method at its best rate.

    A pair has the same task, rank, seed, and so the same data in the same order. Each is divided by their loss. Cells
    in which a method's best rate is the last one tried take no part: it is not tuned there.

    Args:
        results: all runs.
        ours: a method.
        theirs: another.
        seed: the one that rates were chosen on.
    """
    found = []
    for run in results:
        if run.method != ours or run.rate != best_rate(results, run.task, ours, run.rank, seed):
            continue
        rate = best_rate(results, run.task, theirs, run.rank, seed)
        other = results.get(Run(run.task, theirs, run.rank, math.nan if rate is None else rate, run.seed))
        if other is not None:
            found.append((other["loss"] - results[run]["loss"]) / other["loss"])
    who = f"**{ours}** against **{theirs}**, each at its best rate"
    if not found:
        return [], f"{who}: no pairs yet"
    better = sum(difference > 0 for difference in found)
    mean = statistics.mean(found)
    return found, (
        f"{who}: held-out loss {'lower' if mean > 0 else 'higher'} by {abs(mean):.1%} on average "
        f"(standard error {error(found):.1%}), and lower in {better} of {len(found)} pairs"
    )


def fewest(results: Results, seed: int) -> str:
    """Markdown: the least rank at which a method is level with LoRA at its largest rank up to 8, for each task.

    Level: its mean loss is no more than a standard error of the difference above LoRA's. Tasks in which LoRA is tuned
    at one rank only are left out.
    """
    lines = [
        "| task | LoRA, average rank | loss | rankwise is level from | LoRA is level from |",
        "| --- | --- | --- | --- | --- |",
    ]
    for task in dict.fromkeys(run.task for run in results):
        ranks = sorted({run.rank for run in results if run.task == task})
        lora, ours = (
            {rank: losses for rank in ranks if (losses := at_best(results, task, method, rank, seed))}
            for method in (LORA, OURS)
        )
        largest = max((rank for rank in lora if rank <= _ENOUGH), default=None)
        if largest is None or len(lora) < 2 or not ours:
            continue
        goal = lora[largest]
        cells = [task, f"{largest:g}", with_error(goal), _level(ours, goal), _level(lora, goal)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _level(by_rank: dict[float, list[float]], goal: list[float]) -> str:
    for rank, losses in by_rank.items():
        errors = [0.0 if math.isnan(each) else each for each in (error(losses), error(goal))]
        if statistics.mean(losses) <= statistics.mean(goal) + math.hypot(*errors):
            return f"{rank:g}"
    return f"none up to {max(by_rank):g}"


def forgiving(results: Results, seed: int) -> str:
    """How far the loss of the first seed rises at half and at double the best rate, where both methods are tuned."""
    rises: dict[tuple[str, float], list[float]] = {}
    for task, rank, _ in _cells(results):
        best = {method: best_rate(results, task, method, rank, seed) for method in (LORA, OURS)}
        for method, rate in best.items() if None not in best.values() else ():
            losses = curve(results, task, method, rank, seed)
            for other, loss in losses.items():
                rises.setdefault((method, round(other / rate, 6)), []).append(loss / losses[rate] - 1)
    if not rises:
        return f"- **How forgiving**: {OURS} and {LORA} are tuned in no cell yet"
    said = [
        f"{statistics.median(rises[OURS, share]):.0%} at {name} of it "
        f"(LoRA's by {statistics.median(rises[LORA, share]):.0%})"
        for share, name in ((0.5, "half"), (2.0, "double"))
    ]
    return (
        f"- **How forgiving**: beside its best rate, {OURS}'s loss rises by a median of {', and '.join(said)}, "
        f"in {len(rises[OURS, 1.0])} cells"
    )


def report(results: Results, seeds: Sequence[int]) -> str:
    """The tables, and below them the pairs, and what all runs took."""
    others = [method for method in _methods(results) if method != OURS]
    compared = [against(results, OURS, other, seeds[0]) for other in others]
    pairs = [f"- {said}" for differences, said in compared if differences]
    hours = sum(row["seconds"] for row in results.values()) / 3600
    parts = [
        summary(results, seeds[0]),
        "\n".join([*pairs, forgiving(results, seeds[0])]),
        fewest(results, seeds[0]),
        tables(results, seeds[0]),
        f"{len(results)} runs trained for {hours:.1f} hours in all, each with one thread.",
    ]
    return "\n\n".join(parts)


def _cells(results: Results) -> Iterator[tuple[str, float, Results]]:
    """Every task and rank, with their results."""
    for task in dict.fromkeys(run.task for run in results):
        for rank in sorted({run.rank for run in results if run.task == task}):
            own = {run: row for run, row in results.items() if (run.task, run.rank) == (task, rank)}
            yield task, rank, own


def _methods(results: Results) -> list[str]:
    return sorted({run.method for run in results}, key=_place)


def _place(method: str) -> tuple[bool, str]:
    return "rankwise" in method, method


def with_error(values: Sequence[float]) -> str:
    """The mean, and its standard error where there are more than one."""
    if len(values) < 2:
        return f"{values[0]:.4f} (1 run)"
    return f"{statistics.mean(values):.4f} ± {error(values):.4f} ({len(values)} runs)"
