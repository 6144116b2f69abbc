"""Runs on an NVIDIA GPU, if there is one: in every precision, without waits, and with results for any CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainings import LLAMA, in_4_bit

import one_run
import rankwise as rw
from one_run import STEPS, adapted, batches, optimizer_for
from tiny import llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no NVIDIA GPU here.")
GPU = "cuda"


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values.to(GPU) for name, values in batch.items()}


def train(
    model: Any, forward: Callable[..., Any] | None = None, dtype: torch.dtype | None = None
) -> list[float]:
    """Train on the GPU, under autocast to ``dtype`` if it is given, and with a gradient scaler for float16."""
    optimizer, losses = optimizer_for(model), []
    scaler = torch.amp.GradScaler(GPU, enabled=dtype == torch.float16)
    for batch in batches():
        with nullcontext() if dtype is None else torch.autocast(GPU, dtype=dtype):
            loss = (model if forward is None else forward)(**on_gpu(batch)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_learnt(model: Any, losses: list[float]) -> None:
    """Check that the run reached its target and has learnt."""
    state = model.allocation_state
    assert (state.phase, state.budget, state.skipped_steps) == ("final", state.target, 0)
    assert 0 < model.rank_summary().total_rank < state.initial
    assert losses[-1] < losses[0]


def test_a_run_ends_with_the_ranks_and_losses_that_it_has_on_a_cpu() -> None:
    there, here = adapted(), adapted().to(GPU)
    assert train(here) == pytest.approx(one_run.train(there, optimizer_for(there), batches()), abs=2e-3)
    assert here._rankwise_controller.allocated_ranks() == there._rankwise_controller.allocated_ranks()
    assert here.allocation_state.step == STEPS


@pytest.mark.parametrize(
    "form", [{}, {"init_lora_weights": True, "orth_reg_weight": 0.1}], ids=["default", "paper"]
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16 autocast", "float16 autocast"])
def test_every_precision_learns(precision: str, form: dict[str, Any]) -> None:
    base = llama().to(GPU)
    model = adapted(base.bfloat16() if precision == "bfloat16" else base, **form)
    half = {"bfloat16 autocast": torch.bfloat16, "float16 autocast": torch.float16}.get(precision)
    assert_learnt(model, train(model, dtype=half))
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if ".lora_" in name)


def test_4_bit_layers_of_bitsandbytes_learn() -> None:
    pytest.importorskip("bitsandbytes")
    model = adapted(in_4_bit(llama(), LLAMA).to(GPU))
    assert_learnt(model, train(model))


def test_compiled() -> None:
    model = adapted(llama().to(GPU))
    assert_learnt(model, train(model, torch.compile(model)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing_it_is_the_same_run(reentrant: bool) -> None:
    def checkpointed(base: Any) -> None:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        base.enable_input_require_grads()

    plain, other = adapted(llama().to(GPU)), adapted(llama().to(GPU), before=checkpointed)
    assert train(other) == pytest.approx(train(plain), abs=1e-4)


# --- speed ---------------------------------------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let every wait for the GPU raise RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "form", [{}, {"init_lora_weights": True, "orth_reg_weight": 0.1}], ids=["default", "paper"]
)
def test_no_step_but_those_that_cut_waits_for_the_gpu(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).to(GPU)
    config = rw.AdaLoraConfig(
        init_r=8, target_r=1, tinit=3, tfinal=4, deltaT=3, total_step=12, target_modules=["0", "2"], **form
    )
    model = rw.get_peft_model(base, config)
    optimizer = optimizer_for(model)
    inputs = torch.randn(16, 32, device=GPU)
    schedule = model._rankwise_controller.schedule
    checked = set()
    for step in range(1, 13):
        waits = step == 1 or schedule.allocates(step)  # these steps allocate memory and make indices
        with nullcontext() if waits else no_waiting():
            model(inputs).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        checked |= set() if waits else {schedule.phase(step)}
    assert len(checked) == 3, checked  # steps of all phases were checked
    assert len(model.rank_history.records) > 1, "ranks were cut"


# --- files ---------------------------------------------------------------------------------------------------------


def test_an_adapter_trained_on_a_gpu_works_on_a_cpu_and_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(llama().to(GPU))
    train(model)
    model.save_pretrained(tmp_path)
    batch = batches()[0]
    with torch.no_grad():
        here = model.eval()(**on_gpu(batch)).logits.cpu()
        loaded = rw.PeftModel.from_pretrained(llama(), tmp_path).eval()(**batch).logits
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()(**batch).logits
    torch.testing.assert_close(loaded, here, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs, here, atol=1e-4, rtol=1e-4)


def test_a_run_that_is_resumed_in_the_middle_is_the_same_run() -> None:
    def steps(model: Any, optimizer: torch.optim.Optimizer, some: slice) -> None:
        one_run.train(model, optimizer, [on_gpu(batch) for batch in batches()[some]])

    model = adapted(llama().to(GPU))
    optimizer = optimizer_for(model)
    steps(model, optimizer, slice(0, 4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, slice(4, None))
    other = adapted(llama().to(GPU))
    again = optimizer_for(other)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    steps(other, again, slice(4, None))
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --- wrappers for several processes, here with one -----------------------------------------------------------------


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_ddp(nccl: None) -> None:
    model = adapted(llama().to(GPU))
    assert_learnt(model, train(model, nn.parallel.DistributedDataParallel(model)))


def test_fsdp2(nccl: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = adapted(llama().to(GPU))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert_learnt(model, train(model))


# --- trainers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [{"bf16": True}, {"fp16": True}], ids=["bf16", "fp16"])
def test_transformers_trainer(half: dict[str, bool], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = adapted(llama())
    rows = [{"input_ids": ids, "labels": ids} for batch in batches() for ids in batch["input_ids"]]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-2, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1, gradient_accumulation_steps=2, **half,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert_learnt(model, losses)
    assert next(model.parameters()).device.type == "cuda"
