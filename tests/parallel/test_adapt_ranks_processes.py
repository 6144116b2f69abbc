"""Adaptive ranks on PEFT's layers give the same run in several processes as in one: `torchrun` on gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import (
    Outcome,
    once,  # noqa: F401
    options,
)

from one_run import batches
from tiny import llama

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run in one process, with the whole batch."""
    from lora_run import in_one_process

    model, ranks, losses = in_one_process()
    assert ranks.is_over
    folder = tmp_path_factory.mktemp("alone")
    model.save_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(**batches()[0]).logits
    return {
        "losses": losses,
        "history": [list(record.ranks) for record in ranks.rank_history.records],
        "ranks": [layer.rank for layer in ranks.rank_summary().layers],
        "logits": logits,
    }


def assert_same_run(one: dict[str, Any], many: dict[str, Any]) -> None:
    assert many["history"] == one["history"]
    assert many["ranks"] == one["ranks"]
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert 0 in many["history"][-1]  # without a layer at rank 0, the comparison would show little


def assert_loads(folder: Path, one: dict[str, Any]) -> None:
    with torch.no_grad():
        logits = peft.PeftModel.from_pretrained(llama(), folder).eval()(**batches()[0]).logits
    torch.testing.assert_close(logits, one["logits"], rtol=1e-3, atol=1e-5)


# DistributedDataParallel and `fully_shard`.


@pytest.mark.parametrize(
    "case",
    [
        "ddp",
        "ddp, re-entrant",
        "ddp, not re-entrant",
        "ddp, find_unused_parameters",
        "ddp, not re-entrant, find_unused_parameters",
        "ddp, gradients are views",
        "ddp, no_sync",
        "ddp, sped up",
        "ddp, re-entrant, sped up",
        "ddp, not re-entrant, sped up",
        "fsdp, adapted before",
        "fsdp, adapted after",
        "fsdp, adapted before, sped up",
        "fsdp, adapted after, sped up",
        "fsdp, resumed while pruning",
        "fsdp, resumed in the final phase",
    ],
)
def test_two_processes_are_one_with_the_whole_batch(once: Any, alone: dict[str, Any], case: str) -> None:  # noqa: F811
    assert_same_run(alone, once("adapt_ranks.py")[case])


def test_under_ddp_layers_are_narrowed_by_a_call_and_not_before(once: Any, alone: dict[str, Any]) -> None:  # noqa: F811
    outcome: Outcome = once("adapt_ranks.py")
    case = outcome["ddp"]
    assert not case["over"] and case["narrowed"]
    assert case["rows"] == [rank for rank in alone["ranks"] if rank]
    assert_loads(outcome.folder / "ddp", alone)


@pytest.mark.parametrize("folder", ["fsdp-True", "fsdp-False"])
def test_under_fsdp_ranks_that_are_off_stay_as_zeros_and_the_adapter_computes_the_same(
    once: Any,  # noqa: F811
    alone: dict[str, Any],
    folder: str,
) -> None:
    outcome: Outcome = once("adapt_ranks.py")
    assert not outcome["fsdp, adapted before"]["over"]
    assert_loads(outcome.folder / folder, alone)


@pytest.mark.parametrize("step", ["while pruning", "in the final phase"])
def test_under_fsdp_a_resumed_run_is_bit_for_bit_the_undisturbed_one(once: Any, step: str) -> None:  # noqa: F811
    outcome: Outcome = once("adapt_ranks.py")
    assert outcome[f"fsdp, resumed {step}"]["bits"] == outcome["fsdp, adapted before"]["bits"]


# Transformers' Trainer with the callback.


@pytest.mark.slow
def test_trainer_under_ddp_narrows_in_the_end_saves_and_resumes(once: Any) -> None:  # noqa: F811
    outcome: Outcome = once("adapt_ranks_trainer.py")
    whole, resumed, alone = (outcome[name] for name in ("whole", "resumed", "alone"))
    assert whole["wrapped"] == "DistributedDataParallel"
    assert whole["over"] and resumed["bits"] == whole["bits"] and resumed["history"] == whole["history"]
    assert whole["history"] == alone["history"] and whole["losses"] == pytest.approx(
        alone["losses"], abs=1e-4
    )
    assert whole["evaluated"] == pytest.approx(alone["evaluated"], abs=1e-4)
    folder = outcome.folder / "saved"
    with torch.no_grad():
        logits = peft.PeftModel.from_pretrained(llama(), folder).eval()(**batches()[0]).logits
    torch.testing.assert_close(logits, torch.tensor(whole["logits"]), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_trainer_with_fsdp_is_one_process_and_resumes_bit_for_bit(once: Any) -> None:  # noqa: F811
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    outcome: Outcome = once(
        "adapt_ranks_trainer.py", *options(fsdp="full_shard auto_wrap", fsdp_config=sharding)
    )
    whole, resumed, alone = (outcome[name] for name in ("whole", "resumed", "alone"))
    assert resumed["bits"] == whole["bits"]
    assert whole["history"] == alone["history"] and whole["losses"] == pytest.approx(
        alone["losses"], abs=1e-4
    )


# DeepSpeed ZeRO.


@pytest.fixture
def zero(once: Any) -> Outcome:  # noqa: F811
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    outcome: Outcome = once("adapt_ranks_zero.py")
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *(f"stage {stage}" for stage in (1, 2, 3)),
        *(f"{what}, stage {stage}" for what in ("offloaded", "accumulated") for stage in (2, 3)),
        "shared out",
    ],
)
def test_zero_is_one_process_with_the_whole_batch(zero: Outcome, alone: dict[str, Any], case: str) -> None:
    assert_same_run(alone, zero[case])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_adapter_saved_under_zero_computes_the_same(
    zero: Outcome, alone: dict[str, Any], stage: int
) -> None:
    assert_loads(zero.folder / f"stage-{stage}", alone)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_deepspeed_resumes_bit_for_bit(zero: Outcome, stage: int) -> None:
    assert zero[f"resumed, stage {stage}"]["bits"] == zero[f"stage {stage}"]["bits"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_with_deepspeed_is_one_process_and_resumes_bit_for_bit(once: Any, stage: int) -> None:  # noqa: F811
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    zero_options = {
        "stage": stage,
        "stage3_param_persistence_threshold": 500,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    filled_in = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": zero_options, "zero_allow_untested_optimizer": True}
    outcome: Outcome = once(
        "adapt_ranks_trainer.py", *options(deepspeed=config | dict.fromkeys(filled_in, "auto"))
    )
    whole, resumed, alone = (outcome[name] for name in ("whole", "resumed", "alone"))
    assert whole["wrapped"] == "DeepSpeedEngine"
    assert resumed["bits"] == whole["bits"]
    assert whole["history"] == alone["history"] and whole["losses"] == pytest.approx(
        alone["losses"], abs=1e-4
    )
