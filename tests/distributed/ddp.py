"""The run of `one_run` under DistributedDataParallel, in many ways. Usage: torchrun ddp.py FOLDER."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import experts
import torch
import torch.distributed as dist
from reporting import FOLDER, mean, of_run, run
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import rankwise as rw
from one_run import adapted, batches, optimizer_for, train, train_accumulating, train_with_half_the_layers
from tiny import bert

dist.init_process_group("gloo")
RANK = dist.get_rank()


def checkpointed(reentrant: bool, prepare: bool, **changes: Any) -> Any:
    options = {"use_reentrant": reentrant}
    before = functools.partial(rw.prepare_model_for_kbit_training, gradient_checkpointing_kwargs=options)
    model = adapted(before=before if prepare else None, **changes)
    if not prepare:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def combination(reentrant: bool, find_unused: bool, prepare: bool) -> dict[str, Any]:
    model = checkpointed(reentrant, prepare)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    result = of_run(model, train(wrapped, optimizer_for(model), batches(RANK, 2)))
    name = f"{reentrant}-{find_unused}-{prepare}"
    model.save_pretrained(FOLDER / name)
    return {**result, "adapter": name}


def static_graph(reentrant: bool) -> dict[str, Any]:
    model = checkpointed(reentrant, prepare=False)
    wrapped = DistributedDataParallel(model, static_graph=True)
    return of_run(model, train(wrapped, optimizer_for(model), batches(RANK, 2)))


def plain(**options: Any) -> dict[str, Any]:
    model = adapted()
    wrapped = DistributedDataParallel(model, **options)
    result = of_run(model, train(wrapped, optimizer_for(model), batches(RANK, 2)))
    return {**result, "broadcast": [name for name in wrapped.named_module_buffers if "rankwise" in name]}


def accumulating(reentrant: bool, find_unused: bool) -> dict[str, Any]:
    model = checkpointed(reentrant, prepare=False)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    losses = train_accumulating(wrapped, optimizer_for(model), batches(RANK, 2))
    return of_run(model, losses)


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.inner(**batch)


def inside_another_module() -> dict[str, Any]:
    model = checkpointed(reentrant=True, prepare=False)
    wrapped = DistributedDataParallel(Wrapper(model), find_unused_parameters=True)
    return of_run(model, train(wrapped, optimizer_for(model), batches(RANK, 2)))


def sharded_optimizer() -> dict[str, Any]:
    model = adapted()
    wrapped = DistributedDataParallel(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2)
    return of_run(model, train(wrapped, optimizer, batches(RANK, 2)))


def half_precision() -> dict[str, Any]:
    model = adapted()
    wrapped = DistributedDataParallel(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return of_run(model, train(wrapped, optimizer_for(model), batches(RANK, 2)))


def with_a_head() -> dict[str, Any]:
    model = adapted(
        bert(),
        target_modules=["query", "value", "dense"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    wrapped = DistributedDataParallel(model)
    data = [
        {"input_ids": batch["input_ids"], "labels": batch["input_ids"][:, 0] % 3}
        for batch in batches(RANK, 2)
    ]
    return of_run(model, train(wrapped, optimizer_for(model), data))


def loaded_with_layers_at_rank_0() -> dict[str, Any]:
    from tiny import llama

    dist.barrier()  # the first process has saved the adapter by now
    model = rw.PeftModel.from_pretrained(llama(), FOLDER / "False-False-False", is_trainable=True).train()
    at_rank_0 = sum(row.rank == 0 for row in model.rank_summary().layers)
    wrapped = DistributedDataParallel(model)
    losses = train(wrapped, optimizer_for(model), batches(RANK, 2)[:3])
    return {"losses": mean(losses), "at rank 0": at_rank_0}


def compiled(outside: bool) -> dict[str, Any]:
    """With ``torch.compile`` outside of DDP, or inside of it."""
    model = adapted()
    if outside:
        forward = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    else:
        forward = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
    return of_run(model, train(forward, optimizer_for(model), batches(RANK, 2)))


def unused_layers_stay_allowed() -> dict[str, Any]:
    """With find_unused_parameters=True, leaving a layer out of a forward pass is not an error."""
    model = adapted()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    return of_run(model, train_with_half_the_layers(wrapped, model, batches(RANK, 2)))


cases: dict[str, Any] = {
    f"{reentrant}-{find_unused}-{prepare}": functools.partial(combination, reentrant, find_unused, prepare)
    for reentrant, find_unused, prepare in itertools.product([False, True], repeat=3)
}
cases["plain"] = plain
cases["gradients are views of buckets"] = functools.partial(plain, gradient_as_bucket_view=True)
for reentrant, other in itertools.product([False, True], repeat=2):
    cases[f"no_sync, re-entrant {reentrant}, find_unused {other}"] = functools.partial(
        accumulating, reentrant, other
    )
cases["compiled outside"] = functools.partial(compiled, True)
cases["compiled inside"] = functools.partial(compiled, False)
cases["static_graph"] = functools.partial(static_graph, False)
cases["static_graph, re-entrant"] = functools.partial(static_graph, True)
cases["inside another module"] = inside_another_module
cases["ZeroRedundancyOptimizer"] = sharded_optimizer
cases["autocast"] = half_precision
cases["head"] = with_a_head
cases["loaded"] = loaded_with_layers_at_rank_0
cases["unused layers"] = unused_layers_stay_allowed
for name, case in experts.cases.items():
    cases[f"experts, {name}"] = case

if __name__ == "__main__":
    run(cases)
