"""The run of `lora_run` under DeepSpeed ZeRO. Usage: torchrun adapt_ranks_zero.py FOLDER."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import deepspeed_on_cpu
import torch
import torch.distributed as dist
from deepspeed_on_cpu import engine_of, train, train_in_halves
from reporting import FOLDER, of_ranks, run

from lora_run import adapting
from one_run import batches
from rankwise.parallel.zero import whole

deepspeed_on_cpu.prepare()
deepspeed.init_distributed("gloo")
RANK = dist.get_rank()


def whole_run(stage: int, save: bool = False, **options: Any) -> dict[str, Any]:
    model, ranks = adapting()
    engine = engine_of(model, stage, **options)
    losses = train(engine, batches(RANK, 2))
    ranks.finalize_ranks()
    if save:
        factors = [p for name, p in model.named_parameters() if "lora_" in name]
        with whole(factors):
            if RANK == 0:
                model.save_pretrained(FOLDER / f"stage-{stage}")
        dist.barrier()
    result = of_ranks(model, ranks, losses)
    engine.destroy()
    return result


def accumulated(stage: int) -> dict[str, Any]:
    model, ranks = adapting()
    engine = engine_of(model, stage, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2)
    losses = train_in_halves(engine, batches(RANK, 2))
    result = of_ranks(model, ranks, losses)
    engine.destroy()
    return result


def resumed(stage: int, steps: int) -> dict[str, Any]:
    data, folder = batches(RANK, 2), FOLDER / f"checkpoint-of-stage-{stage}"
    model, ranks = adapting()
    engine = engine_of(model, stage)
    losses = train(engine, data[:steps])
    engine.save_checkpoint(str(folder), client_state={"ranks": ranks.state_dict()})
    engine.destroy()
    torch.manual_seed(77)
    model, ranks = adapting()
    engine = engine_of(model, stage)
    _, client = engine.load_checkpoint(str(folder))
    ranks.load_state_dict(client["ranks"])
    result = of_ranks(model, ranks, losses + train(engine, data[steps:]))
    engine.destroy()
    return result


OFFLOADED = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
cases: dict[str, Any] = {}
for stage in (1, 2, 3):
    cases[f"stage {stage}"] = functools.partial(whole_run, stage, save=True)
for stage in (2, 3):
    cases[f"offloaded, stage {stage}"] = functools.partial(whole_run, stage, zero=OFFLOADED)
    cases[f"accumulated, stage {stage}"] = functools.partial(accumulated, stage)
    cases[f"resumed, stage {stage}"] = functools.partial(resumed, stage, 4)
cases["shared out"] = functools.partial(whole_run, 3, zero={"stage3_param_persistence_threshold": 0})

if __name__ == "__main__":
    run(cases)
