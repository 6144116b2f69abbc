"""Transformers' Trainer in several processes, stopped and resumed. Usage: torchrun trainer.py FOLDER [OPTION=JSON …].

Options are fields of TrainingArguments.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from reporting import FOLDER, of_run, run
from transformers import Trainer, TrainingArguments

from one_run import STEPS, adapted, batches

OPTIONS = {name: json.loads(value) for name, value in (argument.split("=", 1) for argument in sys.argv[2:])}


def let_accelerate_shard_on_the_cpu() -> None:
    """Let Accelerate shard on the CPU. It allows accelerators only, but everything else works on a CPU as well."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = __init__


def rows() -> list[dict[str, torch.Tensor]]:
    return [{key: value[row] for key, value in batch.items()} for batch in batches() for row in range(8)]


def trainer(folder: str, **changes: Any) -> Trainer:
    fields = dict(
        output_dir=str(FOLDER / folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2,
        weight_decay=0.01, lr_scheduler_type="constant", max_grad_norm=0.0, train_sampling_strategy="sequential",
        seed=1, use_cpu=True, save_steps=5, logging_steps=1, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    model = adapted(total_step=None, tinit=0.2, tfinal=0.4)
    return Trainer(model, TrainingArguments(**{**fields, **OPTIONS, **changes}), train_dataset=rows())


def result(made: Trainer) -> dict[str, Any]:
    model = made.accelerator.unwrap_model(made.model)
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    budgets = [entry["budget"] for entry in made.state.log_history if "budget" in entry]
    kind = type(made.model_wrapped).__name__
    if "deepspeed" in OPTIONS:
        made.model_wrapped.destroy()
    return {**of_run(model, losses), "budgets": budgets, "wrapped": kind}


def whole() -> dict[str, Any]:
    made = trainer("run")
    made.train()
    made.accelerator.unwrap_model(made.model).save_pretrained(FOLDER / "saved")
    return result(made)


def resumed() -> dict[str, Any]:
    made = trainer("run")
    made.train(resume_from_checkpoint=str(FOLDER / "run" / "checkpoint-5"))
    return result(made)


if __name__ == "__main__":
    if "fsdp" in OPTIONS:
        let_accelerate_shard_on_the_cpu()
    if "deepspeed" in OPTIONS:
        import deepspeed_on_cpu

        deepspeed_on_cpu.prepare()
    dist.init_process_group("gloo")
    run({"whole": whole, "resumed": resumed})
