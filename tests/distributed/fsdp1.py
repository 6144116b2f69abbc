"""Plain LoRA under FSDP version 1, and the refusals there. Usage: torchrun fsdp1.py FOLDER."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from reporting import FOLDER, run
from torch.distributed.fsdp import FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import rankwise as rw
from tiny import llama, token_batches

dist.init_process_group("gloo")


def lora(**changes: Any) -> rw.LoraConfig:
    return rw.LoraConfig(
        **{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}
    )


def wrapped(model: Any) -> Any:
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FSDP(model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def train(model: Any) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in token_batches(3):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def adapted(config: rw.LoraConfig) -> Any:
    model = llama()
    torch.manual_seed(1)
    return rw.get_peft_model(model, config)


def refusal(attempt: Any) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def trains_and_saves() -> dict[str, Any]:
    model = adapted(lora())
    outer = wrapped(model)
    losses = train(outer)
    with FSDP.state_dict_type(outer, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)):
        state = outer.state_dict()
    model.save_pretrained(FOLDER / "lora", state_dict=state)
    return {
        "losses": losses,
        "last": outer(**token_batches(1)[0]).loss.item(),
        "saving": refusal(lambda: model.save_pretrained(FOLDER / "bare")),
        "merging": refusal(model.merge_and_unload),
    }


def alone() -> dict[str, Any]:
    model = adapted(lora())
    return {"losses": train(model), "last": model(**token_batches(1)[0]).loss.item()}


def refused() -> dict[str, Any]:
    schedule = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=6, tfinal=2, target_modules=["q_proj"])
    return {
        "whole": refusal(lambda: wrapped(adapted(lora(modules_to_save=["lm_head"])))),
        "adalora": refusal(lambda: train(wrapped(adapted(schedule)))),
    }


run({"sharded": trains_and_saves, "alone": alone, "refused": refused})
