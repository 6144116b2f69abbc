"""Transformers' Trainer with `AdaptRanks`. Usage: torchrun adapt_ranks_trainer.py FOLDER [OPTION=JSON …].

Options are fields of TrainingArguments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from reporting import FOLDER, fingerprint, run
from trainer import OPTIONS, let_accelerate_shard_on_the_cpu, rows
from transformers import Trainer, TrainingArguments

import rankwise as rw
from lora_run import TARGET, in_one_process, with_lora
from one_run import STEPS, batches
from rankwise.parallel.zero import whole as gathered


def trainer(folder: str, **changes: Any) -> tuple[Trainer, rw.AdaptRanks]:
    fields = dict(
        output_dir=str(FOLDER / folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2,
        weight_decay=0.01, lr_scheduler_type="constant", max_grad_norm=0.0, train_sampling_strategy="sequential",
        seed=1, use_cpu=True, save_steps=5, logging_steps=1, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    callback = rw.AdaptRanks(target_r=TARGET, tinit=2, tfinal=4, deltaT=1)
    arguments = TrainingArguments(**{**fields, **OPTIONS, **changes})
    made = Trainer(
        with_lora(), arguments, train_dataset=rows(), eval_dataset=rows()[:8], callbacks=[callback]
    )
    return made, callback


def result(made: Trainer, callback: rw.AdaptRanks) -> dict[str, Any]:
    model, ranks = made.accelerator.unwrap_model(made.model), callback.ranks
    assert ranks is not None
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    with gathered(factors):
        bits = fingerprint(factors)
    found = {
        "losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry],
        "history": [list(record.ranks) for record in ranks.rank_history.records],
        "bits": bits,
        "wrapped": type(made.model_wrapped).__name__,
        "over": ranks.is_over,
    }
    if "deepspeed" in OPTIONS:
        made.model_wrapped.destroy()
    elif "fsdp" not in OPTIONS:
        found["evaluated"] = made.evaluate()["eval_loss"]
        with torch.no_grad():
            found["logits"] = model.eval()(**batches()[0]).logits.tolist()
    return found


def whole() -> dict[str, Any]:
    made, callback = trainer("run")
    made.train()
    made.save_model(str(FOLDER / "saved"))
    return result(made, callback)


def resumed() -> dict[str, Any]:
    made, callback = trainer("run")
    made.train(resume_from_checkpoint=str(FOLDER / "run" / "checkpoint-5"))
    return result(made, callback)


def alone() -> dict[str, Any]:
    """Train in one process with the whole batch. Each process computes this run for itself."""
    model, ranks, losses = in_one_process()
    ranks.finalize_ranks()
    examples = rows()[:8]
    batch = {name: torch.stack([row[name] for row in examples]) for name in examples[0]}
    with torch.no_grad():
        evaluated = float(model.eval()(**batch).loss)
    return {
        "losses": losses,
        "history": [list(record.ranks) for record in ranks.rank_history.records],
        "evaluated": evaluated,
    }


if __name__ == "__main__":
    if "fsdp" in OPTIONS:
        let_accelerate_shard_on_the_cpu()
    if "deepspeed" in OPTIONS:
        import deepspeed_on_cpu

        deepspeed_on_cpu.prepare()
    dist.init_process_group("gloo")
    run({"whole": whole, "resumed": resumed, "alone": alone})
