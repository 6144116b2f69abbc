"""The run of `one_run` under FSDP2 (``fully_shard``). Usage: torchrun fsdp2.py FOLDER."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reporting import FOLDER, fingerprint, of_run, run
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

import rankwise as rw
from one_run import STEPS, adapted, batches, optimizer_for, train
from tiny import bert, llama

dist.init_process_group("gloo")
RANK = dist.get_rank()
BOTH = init_device_mesh("cpu", (2,))
ALONE = DeviceMesh.from_group([dist.new_group([number]) for number in (0, 1)][RANK], "cpu")
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(model: Any, mesh: DeviceMesh = BOTH, **options: Any) -> Any:
    blocks = model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers
    for block in blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole_run(model: Any, mesh: DeviceMesh = BOTH, **options: Any) -> Any:
    sharded(model, mesh, **options)
    data = batches() if mesh is ALONE else batches(RANK, 2)
    return of_run(model, train(model, optimizer_for(model), data))


def float32() -> dict[str, Any]:
    model = adapted()
    result = whole_run(model)
    model.save_pretrained(FOLDER / "float32")
    result["before merging"] = fingerprint(model.parameters())
    try:
        model.merge_and_unload()
    except ValueError as refusal:
        result["refusal"] = str(refusal)
    return {**result, "after": fingerprint(model.parameters())}


def half_precision(mesh: DeviceMesh, base: torch.dtype) -> dict[str, Any]:
    model = adapted(before=lambda model: model.to(base))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return whole_run(model, mesh, mp_policy=HALF)


def half_precision_base() -> dict[str, Any]:
    return whole_run(adapted(before=lambda model: model.bfloat16()))


def wrapped_checkpoints() -> dict[str, Any]:
    model = adapted()
    block = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, block))
    result = whole_run(model)
    model.save_pretrained(FOLDER / "wrapped")
    return result


def compiled() -> dict[str, Any]:
    model = sharded(adapted())
    forward = torch.compile(model, backend="aot_eager")
    return of_run(model, train(forward, optimizer_for(model), batches(RANK, 2)))


def hybrid() -> dict[str, Any]:
    return whole_run(adapted(), init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards")))


def clipped(mesh: DeviceMesh) -> dict[str, Any]:
    model = sharded(adapted(), mesh)
    optimizer = optimizer_for(model)
    losses = []
    for batch in batches() if mesh is ALONE else batches(RANK, 2):
        loss = model(**batch).loss
        loss.backward()
        clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.01)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return of_run(model, losses)


def accumulated() -> dict[str, Any]:
    model = sharded(adapted())
    optimizer = optimizer_for(model)
    losses = []
    for batch in batches(RANK, 2):
        total = 0.0
        for half in (0, 1):
            model.set_requires_gradient_sync(half == 1)
            loss = model(**{key: value[2 * half : 2 * half + 2] for key, value in batch.items()}).loss / 2
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return of_run(model, losses)


def with_a_head() -> dict[str, Any]:
    names = dict(
        target_modules=["query", "value", "dense"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    model = sharded(adapted(bert(), **names, bias="lora_only"))
    data = [{"input_ids": b["input_ids"], "labels": b["input_ids"][:, 0] % 3} for b in batches(RANK, 2)]
    result = of_run(model, train(model, optimizer_for(model), data))
    model.save_pretrained(FOLDER / "head")
    return result


def resumed_from_a_sharded_checkpoint(steps: int) -> dict[str, Any]:
    data = batches(RANK, 2)
    model = sharded(adapted())
    optimizer = optimizer_for(model)
    losses = train(model, optimizer, data[:steps])
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=FOLDER / f"sharded-{steps}")

    torch.manual_seed(77)
    model = sharded(adapted())
    optimizer = optimizer_for(model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=FOLDER / f"sharded-{steps}")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return of_run(model, losses + train(model, optimizer, data[steps:]))


def resumed_from_an_adapter_folder(sharded_first: bool) -> dict[str, Any]:
    """Values, scores, step and history are restored; the optimizer starts with a new state."""
    data = batches(RANK, 2)
    folder = FOLDER / f"under-way-{sharded_first}"
    model = sharded(adapted())
    train(model, optimizer_for(model), data[:4])
    model.save_pretrained(folder)
    before = of_run(model, [])
    if sharded_first:
        model = sharded(adapted())
        model.load_checkpoint(folder)
    else:
        model = sharded(rw.PeftModel.from_pretrained(llama(), folder, is_trainable=True).train())
    after = of_run(model, [])
    train(model, optimizer_for(model), data[4:])
    return {"before": before, "after": after, "state": model.allocation_state.phase, "steps": STEPS}


def finished_early() -> dict[str, Any]:
    model = sharded(adapted())
    losses = train(model, optimizer_for(model), batches(RANK, 2)[:4])
    model.finalize_ranks()
    model.save_pretrained(FOLDER / "early")
    return of_run(model, losses)


def failing_to_write() -> dict[str, Any]:
    """If the process that writes fails, no other process waits forever."""
    model = sharded(adapted())
    (FOLDER / "no-folder").write_text("")
    try:
        model.save_pretrained(FOLDER / "no-folder" / "inside")
    except OSError as error:
        return {"raised": "no-folder" in str(error)}
    return {}


cases: dict[str, Any] = {
    "float32": float32,
    "hybrid": hybrid,
    "compiled": compiled,
    "accumulated": accumulated,
    "half-precision base": half_precision_base,
    "checkpoint_wrapper": wrapped_checkpoints,
    "clipped": functools.partial(clipped, BOTH),
    "clipped alone": functools.partial(clipped, ALONE),
    "head": with_a_head,
    "resumed in the pruning phase": functools.partial(resumed_from_a_sharded_checkpoint, 4),
    "resumed in the final phase": functools.partial(resumed_from_a_sharded_checkpoint, 8),
    "folder, then sharded": functools.partial(resumed_from_an_adapter_folder, False),
    "sharded, then folder": functools.partial(resumed_from_an_adapter_folder, True),
    "finished early": finished_early,
    "failing to write": failing_to_write,
}
for dtype in (torch.float32, torch.bfloat16):
    cases[f"bfloat16 policy, {dtype}"] = functools.partial(half_precision, BOTH, dtype)
    cases[f"bfloat16 policy, {dtype} alone"] = functools.partial(half_precision, ALONE, dtype)

if __name__ == "__main__":
    run(cases)
