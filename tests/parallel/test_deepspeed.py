"""DeepSpeed ZeRO gives the same run as one process: real DeepSpeed, two processes, scripts in `distributed/`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import (
    Outcome,
    alone,  # noqa: F401
    once,  # noqa: F401
    options,
    same_adapter,
    same_after_resuming,
    same_run,
)
from torch import nn

import rankwise as rw
from one_run import adapted, batches, optimizer_for
from rankwise.parallel import zero
from tiny import llama

STAGES = [1, 2, 3]


@pytest.fixture
def outcome(once: Any) -> Outcome:  # noqa: F811
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    outcome: Outcome = once("zero.py")
    return outcome


def in_one_process(**changes: Any) -> dict[str, Any]:
    """The run in one process, with the whole batch; clipped if asked."""
    clipped = changes.pop("clipped", None)
    model = adapted(**changes)
    optimizer, losses = optimizer_for(model), []
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        if clipped:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clipped)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "losses": losses,
        "scores": model.rankwise_sensitivity.tolist(),
        "history": [list(record.ranks) for record in model.rank_history.records],
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_zero_is_one_process_with_the_whole_batch(outcome: Outcome, alone: dict[str, Any], stage: int):  # noqa: F811
    same_run(alone, outcome[f"stage {stage}"])
    same_adapter(alone["folder"], outcome.folder / f"stage-{stage}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_zero_adds_the_penalty_and_scores_all_factors_of_the_papers_form(outcome: Outcome, stage: int):
    same_run(in_one_process(init_lora_weights=True), outcome[f"paper, stage {stage}"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_that_steps_an_adapter_in_several_parts_counts_one_step(outcome: Outcome, stage: int):
    same_run(in_one_process(init_lora_weights=True), outcome[f"several vectors, stage {stage}"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_clips_before_the_penalty_and_the_scores(outcome: Outcome, stage: int):
    same_run(in_one_process(clipped=0.01), outcome[f"clipped, stage {stage}"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [f"{what}, stage {stage}" for what in ("offloaded", "accumulated") for stage in (2, 3)] + ["shared out"],
)
def test_zero_with_its_other_options_is_one_process(outcome: Outcome, alone: dict[str, Any], case: str):  # noqa: F811
    same_run(alone, outcome[case])


@pytest.mark.slow
def test_zero_in_bfloat16_has_the_same_ranks_in_all_stages(outcome: Outcome):
    first, *others = (outcome[f"bfloat16, stage {stage}"]["history"] for stage in STAGES)
    assert others == [first, first]
    assert len(first) > 2 and 0 in first[-1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_deepspeed_resumes_bit_for_bit(outcome: Outcome, stage: int):
    whole, resumed = outcome[f"stage {stage}"], outcome[f"resumed, stage {stage}"]
    assert resumed["bits"] == whole["bits"] and resumed["history"] == whole["history"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_were_finished_early_stay_so_under_zero(outcome: Outcome, stage: int):
    tensors = load_file(outcome.folder / f"early-{stage}" / "adapter_model.safetensors")
    saved = [len(tensor) for key, tensor in tensors.items() if ".lora_A" in key and len(tensor)]
    assert sorted(saved) == sorted(rank for rank in outcome[f"finished early, stage {stage}"]["kept"] if rank)


@pytest.mark.slow
def test_an_adapter_saved_under_zero_3_gives_the_same_logits_in_peft(outcome: Outcome):
    import peft

    folder = outcome.folder / "stage-3"
    with torch.no_grad():
        ours = rw.PeftModel.from_pretrained(llama(), folder)(**batches()[0]).logits
        theirs = peft.PeftModel.from_pretrained(llama(), folder).eval()(**batches()[0]).logits
    torch.testing.assert_close(theirs, ours)


@pytest.mark.slow
def test_plain_lora_trains_and_is_saved_whole_under_zero_3(outcome: Outcome):
    assert outcome["shared out, LoRA"]["losses"]
    tensors = load_file(outcome.folder / "lora" / "adapter_model.safetensors")
    assert all(tensor.numel() for tensor in tensors.values())


@pytest.mark.slow
def test_half_precision_without_zero_is_refused_and_does_not_train_without_ever_pruning(outcome: Outcome):
    assert '"stage"' in outcome["half precision without ZeRO"]["refusal"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_with_deepspeed_is_one_process_and_resumes_bit_for_bit(
    once: Any,  # noqa: F811
    alone: dict[str, Any],  # noqa: F811
    stage: int,
):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    config = {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 500,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
    }
    filled_in = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    outcome = once("trainer.py", *options(deepspeed=config | dict.fromkeys(filled_in, "auto")))
    same_after_resuming(alone, outcome)
    assert outcome["whole"]["wrapped"] == "DeepSpeedEngine"
    same_adapter(alone["folder"], outcome.folder / "saved")
    same_adapter(alone["folder"], outcome.folder / "run" / "checkpoint-10")


# Without DeepSpeed: refusals that name what it can't do.


def away(elements: int) -> Any:
    return SimpleNamespace(ds_id=0, ds_numel=elements, numel=lambda: 0)


def test_a_factor_that_zero_3_does_not_fetch_is_refused_and_not_taken_for_rank_0():
    with pytest.raises(ValueError, match="300 elements.*stage3_param_persistence_threshold"):
        zero.refuse_away([nn.Parameter(torch.zeros(2)), away(200), away(300)])
    zero.refuse_away([nn.Parameter(torch.zeros(0, 4))])  # this factor really has rank 0


def test_optimizer_state_on_disk_is_refused_under_zero_3():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.ds_id, parameter._z3_optimizer = 0, SimpleNamespace(swap_optimizer=True)
    with pytest.raises(ValueError, match="nvme"):
        zero._master(parameter)


def test_a_deepspeed_that_keeps_its_parts_in_an_unknown_way_is_refused():
    parameter = nn.Parameter(torch.zeros(2))
    parameter._hp_mapping = object()
    with pytest.raises(ValueError, match="does not know"):
        zero._master(parameter)


def test_an_optimizer_that_deepspeed_does_not_step_is_treated_as_usual(monkeypatch: pytest.MonkeyPatch):
    model = adapted()
    model(**batches()[0]).loss.backward()
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    optimizer_for(model).step()
    assert zero.who_steps() == ("", None)
    assert model.allocation_state.step == 1


def test_saving_without_gathered_weights_tells_and_writes_nothing(tmp_path: Path):
    model = adapted()
    next(model.parameters()).ds_id = 0
    with pytest.warns(UserWarning, match="stage3_gather_16bit_weights_on_model_save"):
        model.save_pretrained(tmp_path / "adapter", state_dict={})
    assert not (tmp_path / "adapter").exists()


def test_loading_into_a_model_of_which_zero_trains_copies_is_refused(tmp_path: Path):
    model = adapted()
    model.save_pretrained(tmp_path)
    next(model.parameters())._hp_mapping = None
    with pytest.raises(ValueError, match="engine.load_checkpoint"):
        model.load_checkpoint(tmp_path)
