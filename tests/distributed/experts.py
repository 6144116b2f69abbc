"""Runs on experts under DistributedDataParallel and FSDP2: cases for ``ddp.py``."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from reporting import FOLDER, of_run
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rankwise as rw
from expert_world import EXPERTS, tiny_moe

STEPS = 8


def adapted(way: str = "grouped_mm", init_r: int = 4, **changes: Any) -> Any:
    model = tiny_moe("mixtral", way, num_local_experts=8, **changes)
    config = rw.AdaLoraConfig(
        init_r=init_r, target_r=2, total_step=STEPS, tinit=1, tfinal=2, target_modules=["o_proj"],
        target_parameters=EXPERTS,
    )  # fmt: skip
    torch.manual_seed(1)
    return rw.get_peft_model(model, config)


def batches(parts: int) -> list[torch.Tensor]:
    """Two tokens for each process, so that most experts get none in a step. If ``parts`` is 1, all tokens together."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randint(3, 50, (2, 2), generator=generator) for _ in range(STEPS)]
    rank = dist.get_rank()
    return whole if parts == 1 else [both[rank : rank + 1] for both in whole]


def train(model: Any, inner: Any, parts: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for tokens in batches(parts):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def alone() -> dict[str, Any]:
    model = adapted()
    return of_run(model, train(model, model, 1))


def ddp(way: str) -> dict[str, Any]:
    model = adapted(way)
    wrapped = DistributedDataParallel(model)
    result = of_run(model, train(wrapped, model, 2))
    model.save_pretrained(FOLDER / f"ddp-{way}")
    return result


def fsdp2() -> dict[str, Any]:
    model = adapted()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    result = of_run(model, train(model, model, 2))
    model.save_pretrained(FOLDER / "fsdp2")
    return result


cases: dict[str, Any] = {
    "alone": alone,
    **{f"ddp-{way}": functools.partial(ddp, way) for way in ("eager", "batched_mm", "grouped_mm")},
    "fsdp2": fsdp2,
}
