"""The run of `one_run` in an Accelerate loop. Usage: accelerate launch … accelerated.py FOLDER."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from reporting import FOLDER, of_run, run

from one_run import adapted, batches, optimizer_for

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
    return of_run(model, losses)


if __name__ == "__main__":
    run({"accelerated": accelerated})
