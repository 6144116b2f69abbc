"""A report on an adapter's folder for people: facts, tables and pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.report.inspect import SCHEDULE, AdapterReport, Checkpoint
from rankwise.report.runs import json_object
from rankwise.run.history import RankHistory
from rankwise.storage import TRAINING_STATE_NAME

if TYPE_CHECKING:
    from rich.console import Console


def render_terminal(report: AdapterReport, console: Console) -> None:
    """Print a report in the terminal: facts, a picture of the ranks, a table with bars, and notes.

    Args:
        report: the report that `inspect_adapter` returned.
        console: the rich console to print to.

    Raises:
        ImportError: rich is not installed.

    Example:
        >>> import tempfile, torch, rankwise
        >>> from rich.console import Console
        >>> from rankwise.report import inspect_adapter
        >>> config = rankwise.LoraConfig(r=2, target_modules=["0"])
        >>> model = rankwise.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> console = Console(width=80, record=True, quiet=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     render_terminal(inspect_adapter(folder), console)
    """
    from rich.table import Table
    from rich.text import Text

    # Imported first, for its own message if rich is missing.
    from rankwise.report.terminal import (
        rank_picture,
        rank_table,
    )

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in _facts(report):
        table.add_row(name, Text(said))
    console.print(table)
    summary = report.summary()
    if report.layers:
        console.print("", rank_picture(summary), "", rank_table(summary), sep="\n")
    for note in report.notes:
        console.print(Text("\nnote  ", "bold yellow").append(note, "default not bold"))


def save_heatmap(report: AdapterReport, path: str | os.PathLike[str]) -> None:
    """Draw a report's ranks as a heat map; see `rank_heatmap`.

    Args:
        report: the report that `inspect_adapter` returned.
        path: the file to write. Its extension selects the format: ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the adapter has no layers, or matplotlib does not know the file's extension.

    Example:
        >>> import os, tempfile, torch, rankwise
        >>> from rankwise.report import inspect_adapter
        >>> config = rankwise.LoraConfig(r=2, target_modules=["0"])
        >>> model = rankwise.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/adapter")
        ...     save_heatmap(inspect_adapter(f"{folder}/adapter"), f"{folder}/ranks.png")
        ...     sorted(os.listdir(folder))
        ['adapter', 'ranks.png']
    """
    from rankwise.report.plots import rank_heatmap

    rank_heatmap(report.summary(), path, title=f"Rank of each layer: {Path(report.folder).absolute().name}")


def _facts(report: AdapterReport) -> Iterator[tuple[str, str]]:
    yield "adapter", report.folder
    if report.checkpoint is not None:
        yield "checkpoint", _checkpoint_line(report.checkpoint)
    results = json_object(Path(report.folder) / "results.json")
    best = results.get("best")
    if isinstance(best, dict) and {"step", "metric"} <= best.keys():
        yield (
            "kept",
            f"step {best['step']:,} of {results.get('steps', 0):,}, which has the best {best['metric']}",
        )
    yield "base model", report.base_model or "not recorded"
    details = ", ".join(
        filter(
            None,
            (
                report.task_type,
                report.written_by and f"saved by {report.written_by}",
                "saved as plain LoRA" if report.method == "AdaLoRA" and report.peft_type == "LORA" else None,
            ),
        )
    )
    yield "method", report.method + (f" ({details})" if details else "")
    yield "adapts", _targets_line(report)
    yield "rank", _rank_line(report)
    yield "scale", _scale_line(report)
    if report.schedule is not None:
        yield "schedule", _schedule_line(report.schedule)
    if report.history is not None:
        yield "history", _history_line(report.history)
    yield "parameters", _parameters_line(report)
    for module in report.saved_modules:
        yield "saved in full", f"{module.path} ({module.parameters:,} parameters)"
    yield "files", ", ".join(f"{name} {_bytes(size)}" for name, size in report.files.items())
    if report.resumable:
        yield (
            "training",
            f"can be resumed: {TRAINING_STATE_NAME} is there (leave it out when you share the adapter)",
        )


def _targets_line(report: AdapterReport) -> str:
    targets, parameters = report.target_modules, report.target_parameters
    modules = ", ".join(targets) if isinstance(targets, list) else targets
    if (
        isinstance(targets, list)
        and len(targets) > 8
        and {each.path for each in report.layers} >= set(targets)
    ):
        modules = f"{len(targets)} layers, each named by its whole path"
    if not parameters:
        return modules or "the architecture's defaults"
    return "; ".join(filter(None, (modules, f"parameters {', '.join(parameters)}")))


def _checkpoint_line(checkpoint: Checkpoint) -> str:
    line = "a trainer's checkpoint"
    if checkpoint.step is not None:
        line += f" at step {checkpoint.step:,}"
        line += f" of {checkpoint.total_steps:,}" if checkpoint.total_steps else ""
    return line + (f" (epoch {checkpoint.epoch:.2f})" if checkpoint.epoch is not None else "")


def _rank_line(report: AdapterReport) -> str:
    count = len(report.layers)
    mean = f", {report.total_rank / count:.1f} on average" if count else ""
    line = f"{report.total_rank:,} in {count:,} layer{'' if count == 1 else 's'}{mean}"
    if report.target_r is None:
        return line
    target = f"target {report.target:,} of average size"
    return f"{line}; from {report.budget:,} at the start ({report.init_r} each), {target}"


def _scale_line(report: AdapterReport) -> str:
    if report.scale is not None:
        return f"{report.scale:.4g} (lora_alpha {report.lora_alpha:g})"
    scales = [layer.scale for layer in report.layers if layer.rank]
    if not scales:
        return f"none (lora_alpha {report.lora_alpha:g})"
    return (
        f"{min(scales):.4g} to {max(scales):.4g}, by layer (lora_alpha {report.lora_alpha:g} or its pattern)"
    )


def _schedule_line(schedule: Mapping[str, Any]) -> str:
    tinit, tfinal, total, every = (schedule[name] for name in SCHEDULE)
    if not all(isinstance(value, int) for value in (tinit, tfinal, total)):
        known = (f"{name}={value}" for name, value in schedule.items() if value is not None)
        return ", ".join(known) or "not recorded"
    step = f"every {every:,} steps" if isinstance(every, int) and every > 1 else "every step"
    return f"warm-up to step {tinit:,}, pruning {step} to {total - tfinal:,}, final to {total:,}"


def _history_line(history: RankHistory) -> str:
    records = history.records
    if not records:
        return "empty"
    count = len(records)
    return f"{count:,} record{'' if count == 1 else 's'}, step {records[0].step:,} to {records[-1].step:,}"


def _parameters_line(report: AdapterReport) -> str:
    parts = [
        (sum(layer.parameters for layer in report.layers) - report.gate_parameters, "in A and B of layers"),
        (report.gate_parameters, "in E"),
        (sum(module.parameters for module in report.saved_modules), "in modules saved in full"),
        (report.bias_parameters, "in biases"),
        (report.other_parameters, "in other tensors"),
    ]
    said = ", ".join(f"{count:,} {what}" for count, what in parts if count)
    dtypes = ", ".join(sorted(report.dtypes))
    return f"{report.parameters:,} {dtypes}" + (f": {said}" if said else "")


def _bytes(size: int) -> str:
    """Format a file's size for people.

    Example:
        >>> _bytes(512), _bytes(81_400), _bytes(2_300_000)
        ('512 B', '81.4 kB', '2.3 MB')
    """
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:,.0f} {unit}" if unit == "B" else f"{amount:,.1f} {unit}"
