"""Shared code of the scripts in this folder: cases that report to a file, one for each process."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from rankwise.parallel.zero import whole

FOLDER = Path(sys.argv[1])


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """A fingerprint that is the same for tensors that are equal to the last bit."""
    digest = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(whole.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def mean(losses: list[float]) -> list[float]:
    """The mean over the processes."""
    values = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def of_run(model: Any, losses: list[float]) -> dict[str, Any]:
    """The values by which two runs are compared."""
    buffers = [buffer for name, buffer in model.named_buffers() if name.startswith("rankwise")]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with whole(trained):
        bits = fingerprint([*trained, *buffers])
    return {
        "losses": mean(losses),
        "scores": model.rankwise_sensitivity.tolist(),
        "history": [record.ranks if isinstance(record.ranks, list) else list(record.ranks)
                    for record in model.rank_history.records],
        "bits": bits,
    }  # fmt: skip


def of_ranks(model: Any, ranks: Any, losses: list[float]) -> dict[str, Any]:
    """The values by which two runs of `rankwise.adapt_ranks` on PEFT's layers are compared."""
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    with whole(factors):
        bits = fingerprint(factors)
    return {
        "losses": mean(losses),
        "history": [list(record.ranks) for record in ranks.rank_history.records],
        "ranks": [layer.rank for layer in ranks.rank_summary().layers],
        "bits": bits,
        "over": ranks.is_over,
    }


def run(cases: dict[str, Callable[[], dict[str, Any]]]) -> NoReturn:
    """Run all cases in this process, write what they return, and end the process.

    The process ends without Python's shutdown, in which threads of Gloo or DeepSpeed may abort it or keep it waiting.
    """
    results: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except BaseException:
            print(f"In the case {name!r}, process {dist.get_rank()}:", file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # torchrun then ends the other processes, which may be waiting for this one
        dist.barrier()
    (FOLDER / f"process-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
