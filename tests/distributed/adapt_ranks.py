"""The run of `lora_run` under DistributedDataParallel and `fully_shard`. Usage: torchrun adapt_ranks.py FOLDER."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reporting import FOLDER, of_ranks, run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rankwise as rw
from lora_run import SCHEDULE, TARGET, adapting, with_lora
from one_run import STEPS, batches, optimizer_for, train, train_accumulating

dist.init_process_group("gloo")
RANK = dist.get_rank()
MESH = init_device_mesh("cpu", (2,))


# DistributedDataParallel.


def ddp(
    reentrant: bool | None = None, finish: str = "", fast: bool = False, **options: Any
) -> dict[str, Any]:
    model, ranks = adapting()
    if fast:
        rw.speed_up(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    wrapped = DistributedDataParallel(model, **options)
    result = of_ranks(model, ranks, train(wrapped, optimizer_for(model), batches(RANK, 2)))
    if finish:
        del wrapped
        ranks.finalize_ranks()
        result["narrowed"] = ranks.is_over
        result["rows"] = [p.shape[0] for name, p in model.named_parameters() if "lora_A" in name]
        if RANK == 0:
            model.save_pretrained(FOLDER / finish)
    return result


def accumulating() -> dict[str, Any]:
    model, ranks = adapting()
    wrapped = DistributedDataParallel(model)
    losses = train_accumulating(wrapped, optimizer_for(model), batches(RANK, 2))
    return of_ranks(model, ranks, losses)


# fully_shard.


def sharded(model: Any) -> Any:
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=MESH)
    return fully_shard(model, mesh=MESH)


def save(model: Any, folder: str) -> None:
    """Save as PEFT does when parameters are sharded: from a whole state dictionary."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if RANK == 0:
        model.save_pretrained(FOLDER / folder, state_dict=whole)
    dist.barrier()


def fsdp(adapt_first: bool, fast: bool = False) -> dict[str, Any]:
    if adapt_first:
        model, ranks = adapting()
        if fast:
            rw.speed_up(model)
        sharded(model)
    else:
        model = sharded(with_lora())
        ranks = rw.adapt_ranks(model, target_r=TARGET, **SCHEDULE)
        if fast:
            rw.speed_up(model)
    losses = train(model, optimizer_for(model), batches(RANK, 2))
    ranks.finalize_ranks()
    if not fast:
        save(model, f"fsdp-{adapt_first}")
    return of_ranks(model, ranks, losses)


def fsdp_resumed(steps: int) -> dict[str, Any]:
    data, folder = batches(RANK, 2), FOLDER / f"sharded-{steps}"
    model, ranks = adapting()
    sharded(model)
    optimizer = optimizer_for(model)
    losses = train(model, optimizer, data[:steps])
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save({**states, "ranks": ranks.state_dict()}, checkpoint_id=folder)

    torch.manual_seed(77)
    model, ranks = adapting()
    sharded(model)
    optimizer = optimizer_for(model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    saved = dcp.state_dict_loader._load_state_dict_from_keys({"ranks"}, checkpoint_id=folder)
    ranks.load_state_dict(saved["ranks"])
    return of_ranks(model, ranks, losses + train(model, optimizer, data[steps:]))


cases: dict[str, Any] = {
    "ddp": functools.partial(ddp, finish="ddp"),
    "ddp, re-entrant": functools.partial(ddp, True, static_graph=True),
    "ddp, not re-entrant": functools.partial(ddp, False),
    "ddp, find_unused_parameters": functools.partial(ddp, find_unused_parameters=True),
    "ddp, not re-entrant, find_unused_parameters": functools.partial(ddp, False, find_unused_parameters=True),
    "ddp, gradients are views": functools.partial(ddp, gradient_as_bucket_view=True),
    "ddp, no_sync": accumulating,
    "ddp, sped up": functools.partial(ddp, fast=True),
    "ddp, re-entrant, sped up": functools.partial(ddp, True, fast=True, static_graph=True),
    "ddp, not re-entrant, sped up": functools.partial(ddp, False, fast=True),
    "fsdp, adapted before, sped up": functools.partial(fsdp, True, fast=True),
    "fsdp, adapted after, sped up": functools.partial(fsdp, False, fast=True),
    "fsdp, adapted before": functools.partial(fsdp, True),
    "fsdp, adapted after": functools.partial(fsdp, False),
    "fsdp, resumed while pruning": functools.partial(fsdp_resumed, 4),
    "fsdp, resumed in the final phase": functools.partial(fsdp_resumed, 8),
}

if __name__ == "__main__":
    assert STEPS == 10
    run(cases)
