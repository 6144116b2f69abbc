"""What the results of the comparison say: tables, pairs of runs, how forgiving a method is, and what it saves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from results import Results, Run, at_best, best_rate, curve, error, finite, parameters_at_best

LORA, OURS = "PEFT LoRA", "rankwise"
# Costs counted more then; below an average rank of 1 nothing has changed, and such runs are of both.
BEFORE = "rankwise, the default before"
NATURAL = (
    "chichewa",
    "indonesian",
    "chichewa-letters",
    "indonesian-letters",
)  # where rank is scarce, and no list
PLENTIFUL = (
    "news-topic",
    "product-rating",
)  # where a small rank is enough, with the rivals of the natural tasks
CEILINGS = ("PEFT LoRA, 4 times the rank", "full fine-tuning")
UNTUNED_RANK, UNTUNED_RATES = 8, (2e-4, 1e-3)  # the ends of what is usual with LoRA
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


def is_scarce(results: Results, task: str, rank: float, seed: int) -> bool:
    """Whether LoRA of four times the rank is known to have at least 5 % less loss."""
    lora, more = (at_best(results, task, LORA, each, seed) for each in (rank, 4 * rank))
    return bool(lora and more) and statistics.mean(more) <= 0.95 * statistics.mean(lora)


def summary(results: Results, seed: int, scarce: bool) -> str:
    """Markdown: LoRA, the best of the other methods, rankwise and LoRA of four times the rank, in each tuned cell.

    "Of the way" is how much of what four times the rank would give comes at the smaller budget.

    Args:
        results: all runs.
        seed: the one that rates were chosen on.
        scarce: the cells where rank is (`is_scarce`), or all others.
    """
    columns = ["task", "average rank", "LoRA", "best of the others that are tuned", "rankwise"]
    columns += ["LoRA, 4 times the rank", *(["of the way"] if scarce else [])]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for task, rank, mine in _cells(results):
        found = {method: at_best(results, task, method, rank, seed) for method in _methods(mine)}
        tuned = {method: losses for method, losses in found.items() if losses}
        if not {LORA, OURS} <= set(tuned) or is_scarce(results, task, rank, seed) != scarce:
            continue
        others = {
            method: losses for method, losses in tuned.items() if method.startswith("PEFT") and method != LORA
        }
        best = min(others, key=lambda method: statistics.mean(others[method]), default=None)
        more = at_best(results, task, LORA, 4 * rank, seed)
        next_best = "-"
        if best is not None:
            more_parameters = _more_than_lora(results, task, best, rank, seed)
            next_best = f"{with_error(others[best])}, {best.removeprefix('PEFT ')}{more_parameters}"
        cells = [
            task, f"{rank:g}", with_error(tuned[LORA]), next_best,
            with_error(tuned[OURS]), with_error(more) if more else "-",
        ]  # fmt: skip
        if scarce:
            lora, ours, goal = map(statistics.mean, (tuned[LORA], tuned[OURS], more))
            cells.append(f"{(lora - ours) / (lora - goal):.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _more_than_lora(results: Results, task: str, method: str, rank: float, seed: int) -> str:
    """How many times LoRA's parameters a method has, if that is more."""
    own, lora = (parameters_at_best(results, task, each, rank, seed) for each in (method, LORA))
    return f" with {own / lora:.2f} times the parameters" if own >= 1.01 * lora else ""


def against(results: Results, ours: str, theirs: str, seed: int, scarce: bool) -> list[list[float]]:
    """The differences of the held-out loss, theirs minus ours and divided by theirs, each method at its best rate.

    They are those of pairs of runs of one seed, and so of the same data in the same order, for each task and rank.
    Where a method's best rate is the last one tried it is not tuned, and there is no such pair.

    Args:
        results: all runs.
        ours: a method.
        theirs: another.
        seed: the one that rates were chosen on.
        scarce: the tasks and ranks where rank is (`is_scarce`), or all others.
    """
    found = []
    for task, rank, mine in _cells(results):
        own, rate = (best_rate(results, task, method, rank, seed) for method in (ours, theirs))
        if own is None or rate is None or is_scarce(results, task, rank, seed) != scarce:
            continue
        both = [
            (row["loss"], mine[other]["loss"])
            for run, row in mine.items()
            if run.method == ours
            and run.rate == own
            and (other := replace(run, method=theirs, rate=rate)) in mine
        ]
        found.append([(other - loss) / other for loss, other in both])
    return [differences for differences in found if differences]


def one_by_one(results: Results, seed: int) -> str:
    """Markdown: rankwise against each of the others, in runs of the same data, where rank is scarce and elsewhere."""
    lines = [
        f"| {OURS} against | where rank is scarce | runs | elsewhere | runs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for other in (method for method in _methods(results) if method != OURS):
        found = [against(results, OURS, other, seed, scarce) for scarce in (True, False)]
        if any(found):
            lines.append(f"| {' | '.join([other, *(cell for each in found for cell in _lower(each))])} |")
    return "\n".join(lines)


def _lower(cells: Sequence[Sequence[float]]) -> tuple[str, str]:
    """By how much the loss is lower, the mean of the cells' means with its standard error; and in how many runs."""
    if not cells:
        return "-", "-"
    means = [statistics.mean(cell) for cell in cells]
    mean, runs = statistics.mean(means), [difference for cell in cells for difference in cell]
    much = f"{abs(mean):.1%} {'higher' if mean < 0 else 'lower'}"
    much += f" ± {error(means):.1%} ({len(means)})" if len(means) > 1 else " (1)"
    return much, f"lower in {sum(difference > 0 for difference in runs)} of {len(runs)}"


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
    same = 0
    for task, rank, _ in _cells(results):
        best = {method: best_rate(results, task, method, rank, seed) for method in (LORA, OURS)}
        same += None not in best.values() and best[LORA] == best[OURS]
        for method, rate in best.items() if None not in best.values() else ():
            losses = curve(results, task, method, rank, seed)
            for other, loss in losses.items():
                rises.setdefault((method, round(other / rate, 6)), []).append(loss / losses[rate] - 1)
    if not rises:
        return f"{OURS} and {LORA} are tuned in no cell yet."
    said = [
        f"{statistics.median(rises[OURS, share]):.0%} at {name} of it "
        f"(LoRA's by {statistics.median(rises[LORA, share]):.0%})"
        for share, name in ((0.5, "half"), (2.0, "double"))
    ]
    return (
        f"{OURS}'s best rate is LoRA's in {same} of {len(rises[OURS, 1.0])} cells. Beside its best rate its loss rises "
        f"by a median of {', and '.join(said)}."
    )


def at_the_same_rate(results: Results) -> str:
    """How the losses compare in all runs of one rate, good or bad: does one break where LoRA's doesn't?"""
    both = [
        (finite(row["loss"]), finite(other["loss"]))
        for run, row in results.items()
        if run.method == OURS and (other := results.get(replace(run, method=LORA))) is not None
    ]
    if not both:
        return f"No runs of {OURS} and {LORA} have the same rate yet."
    lower = sum(ours < lora for ours, lora in both)
    worst, worst_of_lora = (
        max(one / other if math.isfinite(other) else 0.0 for one, other in pairs)
        for pairs in (both, [(lora, ours) for ours, lora in both])
    )
    return (
        f"At every learning rate that both were tried at, good or bad, {OURS}'s loss is lower than LoRA's in "
        f"{lower} of {len(both)} runs, and never more than {worst:.2f} times as high; LoRA's is up to "
        f"{worst_of_lora:.1f} times as high as {OURS}'s."
    )


def report(results: Results, seed: int) -> dict[str, str]:
    """All that is said of the results, in Markdown, by what it is about; ``seed`` is the one rates were chosen on.

    All but "now", "rivals", "rivals elsewhere", "plentiful", "untuned", "all" and "time" is of the default before,
    where there are runs of it.
    """
    hours = sum(row["seconds"] for row in results.values()) / 3600
    on_gpu = sum("device" in row for row in results.values())
    earlier = of_the_default_before(results)
    return {
        "now": now(results, seed),
        "rivals": rivals(results, seed),
        "rivals elsewhere": rivals(results, seed, 2, PLENTIFUL),
        "plentiful": plentiful(results, seed),
        "untuned": untuned(results, seed),
        "scarce": summary(earlier, seed, scarce=True),
        "elsewhere": summary(earlier, seed, scarce=False),
        "one by one": one_by_one(earlier, seed),
        "forgiving": forgiving(earlier, seed),
        "at the same rate": at_the_same_rate(earlier),
        "fewest": fewest(earlier, seed),
        "all": tables(results, seed),
        "time": f"{len(results)} runs trained for {hours:.1f} hours in all, each with one thread of a processor"
        + (f", {on_gpu} of them on a GPU." if on_gpu else "."),
    }


def of_the_default_before(results: Results) -> Results:
    """The results with the default before instead of the default now, if there are any of it."""
    if not any(run.method == BEFORE for run in results):
        return results
    others = {run: row for run, row in results.items() if run.method != OURS or run.rank < 1}
    return {replace(run, method=OURS) if run.method == BEFORE else run: row for run, row in others.items()}


def now(results: Results, seed: int) -> str:
    """Markdown: today's default beside LoRA and the default before, wherever it has been tried.

    Each method is at the best of the rates that it was tried at, be it at their edge or not. `untuned` shows the larger
    ranks.
    """
    lines = [
        "| task | average rank | LoRA | the default before | the default | LoRA, 4 times the rank | of the way |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, rank, mine in _cells(results):
        found = {method: at_best_tried(mine, task, method, rank, seed) for method in (LORA, BEFORE, OURS)}
        more = at_best_tried(results, task, LORA, 4 * rank, seed)
        if not 1 <= rank < UNTUNED_RANK or not found[OURS]:
            continue
        cells = [task, f"{rank:g}", *(with_error(each) if each else "-" for each in (*found.values(), more))]
        cells.append(_share(found[LORA], found[OURS], more))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(lora: Sequence[float], ours: Sequence[float], more: Sequence[float]) -> str:
    """How much of what more rank brings comes without it, where it brings more than two standard errors."""
    if not (lora and more):
        return "-"
    less, own, goal = map(statistics.mean, (lora, ours, more))
    return f"{(less - own) / (less - goal):.0%}" if _brings_more(lora, more) else "rank is plentiful"


def _brings_more(lora: Sequence[float], more: Sequence[float]) -> bool:
    """Whether more rank lowers the loss by more than two standard errors."""
    uncertain = 2 * math.hypot(*(error(losses) for losses in (lora, more) if len(losses) > 1))
    return statistics.mean(lora) - statistics.mean(more) > uncertain


def rivals(results: Results, seed: int, rank: float = 1, tasks: Sequence[str] = NATURAL) -> str:
    """Markdown: every method at one average rank on some tasks, and the ceilings below.

    Parameters are multiples of LoRA's, averaged over the tasks. Each loss is at the best rate that was tried. "*" marks
    a rate without a worse neighbour on each side.
    """
    lines = [
        f"| method | parameters | {' | '.join(tasks)} |",
        f"| --- | --- |{' --- |' * len(tasks)}",
    ]
    mine = {run: row for run, row in results.items() if run.task in tasks}
    rows = {run: row for run, row in mine.items() if run.rank == rank and run.method != BEFORE}
    lora = {run.task: row["parameters"] for run, row in rows.items() if run.method == LORA}
    rows |= {
        replace(run, method=CEILINGS[0], rank=rank): row
        for run, row in mine.items()
        if (run.method, run.rank) == (LORA, 4 * rank)
    }
    for method in sorted(_methods(rows), key=CEILINGS.__contains__):
        found = {run: row for run, row in rows.items() if run.method == method}
        shares = [
            statistics.mean(row["parameters"] for run, row in found.items() if run.task == task) / lora[task]
            for task in dict.fromkeys(run.task for run in found)
        ]
        cells = [_rival(found, task, method, rank, seed) for task in tasks]
        lines.append(f"| {method} | {statistics.mean(shares):.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rival(results: Results, task: str, method: str, rank: float, seed: int) -> str:
    losses = at_best_tried(results, task, method, rank, seed)
    if not losses:
        return "-"
    inside = best_rate(results, task, method, rank, seed) is not None
    return with_error(losses) + ("" if inside else " *")


def plentiful(results: Results, seed: int) -> str:
    """How today's default compares with LoRA where four times the rank is no help, in runs of the same seed."""
    cells = []
    for task, rank, mine in _cells(results):
        lora, more = (at_best_tried(results, task, LORA, each, seed) for each in (rank, 4 * rank))
        if (
            not 1 <= rank < UNTUNED_RANK
            or task in NATURAL
            or not (lora and at_best_tried(mine, task, OURS, rank, seed))
        ):
            continue
        if more and _brings_more(lora, more):
            continue
        ours, theirs = (_rows_at_best_tried(mine, task, method, rank, seed) for method in (OURS, LORA))
        cells.append([(theirs[own] - ours[own]) / theirs[own] for own in ours if own in theirs])
    much, runs = _lower(cells)
    return (
        f"Where four times the rank is no help, or was not tried, the default's loss is {much} than LoRA's, and {runs} "
        "runs of the same seed."
    )


def untuned(results: Results, seed: int) -> str:
    """Markdown: LoRA, PEFT's AdaLoRA and today's default with usual settings that fit no task, on one seed."""
    methods = (LORA, "PEFT AdaLoRA", OURS)
    heads = [f"{method.removeprefix('PEFT ')}, {rate:g}" for rate in UNTUNED_RATES for method in methods]
    lines = [f"| task | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for task in dict.fromkeys(run.task for run in results):
        runs = [Run(task, method, UNTUNED_RANK, rate, seed) for rate in UNTUNED_RATES for method in methods]
        if any(run in results for run in runs if run.method == OURS):
            cells = [f"{finite(results[run]['loss']):.4f}" if run in results else "-" for run in runs]
            lines.append(f"| {' | '.join([task, *cells])} |")
    return "\n".join(lines)


def at_best_tried(results: Results, task: str, method: str, rank: float, seed: int) -> list[float]:
    """The losses of all seeds at the rate that has most seeds, and of these the least mean."""
    return list(_rows_at_best_tried(results, task, method, rank, seed).values())


def _rows_at_best_tried(results: Results, task: str, method: str, rank: float, seed: int) -> dict[int, float]:
    """As `at_best_tried`, by seed."""
    rates = curve(results, task, method, rank, seed)
    rows = {
        rate: {
            run.seed: finite(row["loss"])
            for run, row in results.items()
            if (run.task, run.method, run.rank, run.rate) == (task, method, rank, rate)
        }
        for rate in rates
    }
    none: dict[int, float] = {}
    return min(rows.values(), key=lambda own: (-len(own), statistics.mean(own.values())), default=none)


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
    """The mean, its standard error where there are several, and of how many it is."""
    if len(values) < 2:
        return f"{values[0]:.4f} (1)"
    return f"{statistics.mean(values):.4f} ± {error(values):.4f} ({len(values)})"
