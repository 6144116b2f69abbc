"""The run of `one_run` under DeepSpeed ZeRO. Usage: torchrun zero.py FOLDER."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import deepspeed_on_cpu
import torch
import torch.distributed as dist
from deepspeed_on_cpu import engine_of, train, train_in_halves
from reporting import FOLDER, of_run, run

import rankwise as rw
from one_run import adapted, batches
from tiny import llama

deepspeed_on_cpu.prepare()
deepspeed.init_distributed("gloo")
RANK = dist.get_rank()


def whole_run(stage: int, save: bool = False, adapter: Any = None, **options: Any) -> dict[str, Any]:
    model = adapted(**(adapter or {}))
    engine = engine_of(model, stage, **options)
    losses = train(engine, batches(RANK, 2))
    if save:
        model.save_pretrained(FOLDER / f"stage-{stage}")
    result = {**of_run(model, losses), "penalty": float(model.orthogonal_penalty())}
    engine.destroy()
    return result


def several_vectors(stage: int) -> dict[str, Any]:
    """DeepSpeed steps the optimizer once for each of its parameter groups."""
    model = adapted(init_lora_weights=True)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if f"lora_{key}" in name], "lr": 1e-2} for key in ("B", "E", "A")
    ]
    engine = engine_of(model, stage, torch.optim.AdamW(groups))
    result = of_run(model, train(engine, batches(RANK, 2)))
    engine.destroy()
    return result


def accumulated(stage: int) -> dict[str, Any]:
    model = adapted()
    engine = engine_of(model, stage, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2)
    losses = train_in_halves(engine, batches(RANK, 2))
    result = of_run(model, losses)
    engine.destroy()
    return result


def resumed(stage: int, steps: int) -> dict[str, Any]:
    data, folder = batches(RANK, 2), str(FOLDER / f"checkpoint-of-stage-{stage}")
    engine = engine_of(adapted(), stage)
    losses = train(engine, data[:steps])
    engine.save_checkpoint(folder)
    engine.destroy()
    torch.manual_seed(77)
    model = adapted()
    engine = engine_of(model, stage)
    engine.load_checkpoint(folder)
    result = of_run(model, losses + train(engine, data[steps:]))
    engine.destroy()
    return result


def finished_early(stage: int) -> dict[str, Any]:
    model = adapted()
    engine = engine_of(model, stage)
    losses = train(engine, batches(RANK, 2)[:4])
    model.finalize_ranks()
    ranks = model.rank_history.records[-1].ranks
    train(engine, batches(RANK, 2)[4:6])
    model.save_pretrained(FOLDER / f"early-{stage}")
    result = {**of_run(model, losses), "kept": list(ranks)}
    engine.destroy()
    return result


def refused(make: Any) -> dict[str, Any]:
    try:
        make()
    except ValueError as refusal:
        return {"refusal": str(refusal)}
    return {"refusal": None}


def plain_lora(zero: Any) -> dict[str, Any]:
    """Plain LoRA has no scores, but its factors are sharded all the same."""
    model = rw.get_peft_model(llama(), rw.LoraConfig(r=4, target_modules="all-linear")).train()
    engine = engine_of(model, 3, zero=zero)
    losses = train(engine, batches(RANK, 2))
    model.save_pretrained(FOLDER / "lora")
    engine.destroy()
    return {"losses": losses[-1] < losses[0]}


CLIPPED = 0.01
OFFLOADED = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
BFLOAT16 = {"bf16": {"enabled": True}}
cases: dict[str, Any] = {}
for stage in (1, 2, 3):
    cases[f"stage {stage}"] = functools.partial(whole_run, stage, save=True)
    cases[f"paper, stage {stage}"] = functools.partial(whole_run, stage, adapter={"init_lora_weights": True})
    cases[f"bfloat16, stage {stage}"] = functools.partial(whole_run, stage, **BFLOAT16)
for stage in (2, 3):
    cases[f"clipped, stage {stage}"] = functools.partial(whole_run, stage, gradient_clipping=CLIPPED)
    cases[f"offloaded, stage {stage}"] = functools.partial(whole_run, stage, zero=OFFLOADED)
    cases[f"several vectors, stage {stage}"] = functools.partial(several_vectors, stage)
    cases[f"accumulated, stage {stage}"] = functools.partial(accumulated, stage)
    cases[f"resumed, stage {stage}"] = functools.partial(resumed, stage, 4)
    cases[f"finished early, stage {stage}"] = functools.partial(finished_early, stage)
nothing_stays = {"stage3_param_persistence_threshold": 0}
cases["shared out"] = functools.partial(whole_run, 3, zero=nothing_stays)
cases["shared out, LoRA"] = functools.partial(plain_lora, nothing_stays)
cases["half precision without ZeRO"] = functools.partial(refused, functools.partial(whole_run, 0, **BFLOAT16))

if __name__ == "__main__":
    run(cases)
