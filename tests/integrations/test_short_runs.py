"""Runs of few steps: the default schedule fits the length that a trainer reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rankwise as rw
from tiny import llama, token_batches

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("given", [{}, {"tinit": 0}, {"tfinal": 0.6}, {"tinit": 0.02, "tfinal": 0.6}])
def test_a_trainer_of_few_steps_takes_the_default_schedule(
    tmp_path: Path, steps: int, given: dict[str, Any]
) -> None:
    config = rw.AdaLoraConfig(init_r=4, target_r=2, target_modules=["q_proj", "v_proj"], **given)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    rows = [{"input_ids": ids, "labels": ids} for batch in token_batches(2) for ids in batch["input_ids"]]
    model: Any = rw.get_peft_model(llama(), config)
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    state = model.allocation_state
    assert state.step == state.total_step == steps and state.budget == state.target
    model.save_pretrained(tmp_path / "adapter")
    rw.PeftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True)
