"""The run of `one_run` in an Accelerate loop. Usage: accelerate launch … accelerated.py FOLDER."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from reporting import FOLDER, of_run, run
from trainer import let_accelerate_shard_on_the_cpu

from one_run import adapted, batches, optimizer_for

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    let_accelerate_shard_on_the_cpu()
accelerator = Accelerator()


def accelerated() -> dict[str, Any]:
    model = adapted()
    wrapped, optimizer = accelerator.prepare(model, optimizer_for(model))
    losses = []
    for batch in batches(accelerator.process_index, accelerator.num_processes):
        loss = wrapped(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.unwrap_model(wrapped).save_pretrained(FOLDER / "saved")
    return {**of_run(model, losses), "wrapped": type(wrapped).__name__}


if __name__ == "__main__":
    run({"accelerated": accelerated})
