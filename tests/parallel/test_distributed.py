"""Several processes give the same run as one: `torchrun` on gloo, with the scripts in `distributed/`."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rankwise as rw
from expert_world import tiny_moe
from one_run import (
    ACCELERATE,
    ACCELERATE_FSDP,
    STEPS,
    adapted,
    batches,
    launch,
    optimizer_for,
    train,
    train_with_half_the_layers,
)
from rankwise.parallel.ddp import keep_in_graph
from tiny import llama

TRIPLES = list(itertools.product(["False", "True"], repeat=3))
Results = dict[str, dict[str, Any]]


class Outcome:
    """The reports of all processes of a launch, after a check that they agree to the last bit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        processes: list[Results] = [
            json.loads((folder / f"process-{number}.json").read_text()) for number in (0, 1)
        ]
        assert processes[0] == processes[1]
        self.cases = processes[0]

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.cases[name]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Launch each script once, even if several test processes need its outcome."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    @functools.cache
    def outcome(script: str, *arguments: str) -> Outcome:
        folder = shared / f"launched-{Path(script).stem}-{abs(hash_of(arguments))}"
        with locked(folder.with_suffix(".lock")):
            if not (folder / "process-0.json").is_file():
                folder.mkdir(exist_ok=True)
                launch(script, folder, *arguments)
        return Outcome(folder)

    return outcome


def hash_of(arguments: tuple[str, ...]) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate("|".join(arguments)))


class locked:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        import fcntl

        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run in one process, with the whole batch."""
    model = adapted()
    losses = train(model, optimizer_for(model), batches())
    folder = tmp_path_factory.mktemp("alone")
    model.save_pretrained(folder)
    return {
        "losses": losses,
        "scores": model.rankwise_sensitivity.tolist(),
        "history": [list(r.ranks) for r in model.rank_history.records],
        "folder": folder,
    }


def same_run(one: dict[str, Any], many: dict[str, Any]) -> None:
    assert many["history"] == one["history"]
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert many["scores"] == pytest.approx(one["scores"], rel=1e-3, abs=1e-6)
    assert 0 in many["history"][-1]  # without a layer at rank 0, the comparison would show little


def same_adapter(one: Path, many: Path) -> None:
    expected, given = (load_file(folder / "adapter_model.safetensors") for folder in (one, many))
    assert given.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(given[key], tensor, rtol=1e-3, atol=1e-5, msg=key)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, many)]
    assert configs[0] == configs[1]


# DistributedDataParallel.


@pytest.mark.parametrize(("reentrant", "find_unused", "prepared"), TRIPLES)
def test_ddp_with_checkpointing_is_one_process_with_the_whole_batch(
    once: Any, alone: dict[str, Any], reentrant: str, find_unused: str, prepared: str
):
    outcome = once("ddp.py")
    case = outcome[f"{reentrant}-{find_unused}-{prepared}"]
    same_run(alone, case)
    same_adapter(alone["folder"], outcome.folder / case["adapter"])


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "gradients are views of buckets",
        "static_graph",
        "static_graph, re-entrant",
        "compiled outside",
        "compiled inside",
        "inside another module",
        "ZeroRedundancyOptimizer",
        *(f"no_sync, re-entrant {one}, find_unused {two}" for one in (False, True) for two in (False, True)),
    ],
)
def test_ddp_with_its_other_options_is_one_process_with_the_whole_batch(
    once: Any, alone: dict[str, Any], case: str
):
    same_run(alone, once("ddp.py")[case])


def test_ddp_leaves_the_runs_state_alone(once: Any):
    assert once("ddp.py")["plain"]["broadcast"] == []


def test_ddp_under_autocast_finds_ranks_like_those_without(once: Any, alone: dict[str, Any]):
    """bfloat16 rounds, and some directions in 14 layers with initial ranks of 4 have nearly the same worth."""
    for own, other in zip(once("ddp.py")["autocast"]["history"], alone["history"], strict=True):
        assert abs(sum(own) - sum(other)) <= 1
        assert sum(abs(one - another) for one, another in zip(own, other, strict=True)) <= 6


def test_ddp_trains_a_head_and_the_adapter(once: Any):
    case = once("ddp.py")["head"]
    assert case["losses"][-1] < case["losses"][0]


def test_ddp_trains_on_an_adapter_that_was_loaded_with_layers_at_rank_0(once: Any):
    case = once("ddp.py")["loaded"]
    assert case["at rank 0"] and all(map(math.isfinite, case["losses"]))


def test_ddp_still_finds_parameters_that_really_are_unused(once: Any):
    model = adapted()
    losses = train_with_half_the_layers(model, model, batches())
    case = once("ddp.py")["unused layers"]
    assert case["losses"] == pytest.approx(losses, abs=1e-5)
    assert case["history"] == [list(record.ranks) for record in model.rank_history.records]


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_layer_that_only_takes_part_can_be_followed_by_an_operation_in_place(process_group: None):
    layer, idle = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    x = torch.randn(4, 2)
    taken = keep_in_graph(layer(x), [idle])
    torch.relu_(taken).sum().backward()
    assert torch.equal(taken, torch.relu(layer(x)))
    assert torch.equal(idle.grad, torch.zeros(3))


def test_taking_part_costs_nothing_without_other_processes_or_gradients(process_group: None):
    idle = nn.Parameter(torch.ones(3))
    output = torch.ones(2)
    with torch.no_grad():
        assert keep_in_graph(output, [idle]) is output
    torch.distributed.destroy_process_group()
    assert keep_in_graph(output, [idle]) is output
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def test_ddp_of_one_process_reaches_a_convolution_at_rank_0(process_group: None):
    """The convolution is followed by an in-place activation, as is common."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 2))
    config = rw.AdaLoraConfig(
        init_r=2, target_r=1, total_step=6, tinit=1, tfinal=2, target_modules=["0", "3"]
    )
    torch.manual_seed(0)
    model = rw.get_peft_model(model, config)
    for factor in filter(lambda each: each.requires_grad, model[0].adapter_parameters("default").values()):
        factor.register_hook(lambda gradient: gradient * 0)  # so that it loses its ranks
    wrapped, optimizer = DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(6):
        wrapped(torch.randn(3, 2, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.rank_history.records[-1].ranks == [0, 2]


def test_steps_inside_no_sync_are_refused_and_gradients_may_be_accumulated_there(process_group: None):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    config = rw.AdaLoraConfig(init_r=2, target_r=1, total_step=6, target_modules=["0", "2"])
    model = rw.get_peft_model(model, config)
    wrapped, optimizer = DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=0.1)
    with wrapped.no_sync():
        wrapped(torch.randn(3, 4)).square().sum().backward()
        with pytest.raises(ValueError, match=r"local SGD.*outside of `no_sync`"):
            optimizer.step()
    wrapped(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert model.allocation_state.step == 1


def test_processes_with_experts_that_no_token_reaches_give_the_run_of_one(once: Any):
    outcome = once("ddp.py")
    alone = outcome["experts, alone"]
    for name in ("ddp-eager", "ddp-batched_mm", "ddp-grouped_mm", "fsdp2"):
        result = outcome[f"experts, {name}"]
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-4), name
        # Sums of gradients are rounded in another order, and some directions have nearly the same worth.
        differing = [
            sum(abs(one - other) for one, other in zip(*ranks, strict=True))
            for ranks in zip(result["history"], alone["history"], strict=True)
        ]
        assert max(differing) <= 2, name
        loaded = rw.PeftModel.from_pretrained(tiny_moe("mixtral", num_local_experts=8), outcome.folder / name)
        assert [layer.rank for layer in loaded.rank_summary().layers] == result["history"][-1], name


# FSDP2.


@pytest.mark.slow
@pytest.mark.parametrize("case", ["float32", "hybrid", "accumulated", "checkpoint_wrapper", "compiled"])
def test_fsdp2_is_one_process_with_the_whole_batch(once: Any, alone: dict[str, Any], case: str):
    same_run(alone, once("fsdp2.py")[case])


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["float32", "wrapped"])
def test_an_adapter_saved_under_fsdp2_is_the_one_of_one_process(
    once: Any, alone: dict[str, Any], folder: str
):
    same_adapter(alone["folder"], once("fsdp2.py").folder / folder)


@pytest.mark.slow
def test_an_adapter_saved_under_fsdp2_gives_the_same_logits_in_peft(once: Any):
    import peft

    folder = once("fsdp2.py").folder / "float32"
    with torch.no_grad():
        ours = rw.PeftModel.from_pretrained(llama(), folder)(**batches()[0]).logits
        theirs = peft.PeftModel.from_pretrained(llama(), folder).eval()(**batches()[0]).logits
    torch.testing.assert_close(theirs, ours)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp2_with_mixed_precision_and_checkpointing_has_the_ranks_of_one_process(
    once: Any, dtype: torch.dtype
):
    two, one = (once("fsdp2.py")[f"bfloat16 policy, {dtype}{of}"] for of in ("", " alone"))
    assert two["history"] == one["history"]
    # The losses are about 4, computed from products in bfloat16, whose steps are 0.4 %.
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-2)


@pytest.mark.slow
def test_fsdp2_takes_float32_adapters_in_a_half_precision_base(once: Any, alone: dict[str, Any]):
    case = once("fsdp2.py")["half-precision base"]
    assert case["history"] == alone["history"]


@pytest.mark.slow
def test_fsdp2_with_gradient_clipping_is_one_process(once: Any):
    two, one = once("fsdp2.py")["clipped"], once("fsdp2.py")["clipped alone"]
    assert two["history"] == one["history"] and two["losses"] == pytest.approx(one["losses"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["pruning", "final"])
def test_a_sharded_checkpoint_resumes_bit_for_bit(once: Any, phase: str):
    whole, resumed = once("fsdp2.py")["float32"], once("fsdp2.py")[f"resumed in the {phase} phase"]
    assert resumed["bits"] == whole["bits"] and resumed["history"] == whole["history"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["folder, then sharded", "sharded, then folder"])
def test_an_adapter_folder_of_an_unfinished_run_resumes_before_or_after_sharding(once: Any, order: str):
    case = once("fsdp2.py")[order]
    assert case["after"] == case["before"]
    assert case["state"] == "final"


@pytest.mark.slow
def test_fsdp2_saves_a_head_and_biases_with_the_adapter(once: Any):
    saved = load_file(once("fsdp2.py").folder / "head" / "adapter_model.safetensors")
    assert saved["base_model.model.classifier.weight"].shape == (3, 32)
    query = "base_model.model.bert.encoder.layer.1.attention.self.query"
    inside = ".base_layer" if f"{query}.lora_A.weight" in saved else ""  # where PEFT looks for the bias
    assert saved[f"{query}{inside}.bias"].any()


@pytest.mark.slow
def test_ranks_can_be_finished_early_under_fsdp2(once: Any):
    outcome = once("fsdp2.py")
    ranks = outcome["finished early"]["history"][-1]
    assert 0 < sum(ranks) < sum(outcome["finished early"]["history"][0])
    tensors = load_file(outcome.folder / "early" / "adapter_model.safetensors")
    assert sum(len(tensor) for key, tensor in tensors.items() if ".lora_A" in key) == sum(ranks)


@pytest.mark.slow
def test_merging_a_sharded_model_is_refused_and_changes_nothing(once: Any):
    case = once("fsdp2.py")["float32"]
    assert "save_pretrained" in case["refusal"] and case["after"] == case["before merging"]


@pytest.mark.slow
def test_no_process_waits_for_one_that_cannot_write(once: Any):
    assert once("fsdp2.py")["failing to write"]["raised"]


# Trainer and Accelerate.

SHARDED = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "activation_checkpointing": True}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


def options(**fields: Any) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in fields.items()]


def same_after_resuming(alone: dict[str, Any], outcome: Outcome, atol: float = 1e-5, moved: int = 0) -> None:
    """Compare the runs. ``moved`` is the number of ranks that may differ, because scores are rounded coarsely."""
    whole, resumed = outcome["whole"], outcome["resumed"]
    for ours, theirs in zip(whole["history"], alone["history"], strict=True):
        assert sum(abs(one - other) for one, other in zip(ours, theirs, strict=True)) <= 2 * moved
    assert whole["losses"] == pytest.approx(alone["losses"], abs=atol)
    assert resumed["bits"] == whole["bits"] and resumed["history"] == whole["history"]
    assert len(whole["budgets"]) == STEPS


@pytest.mark.slow
def test_trainer_under_torchrun_is_one_process_and_resumes_bit_for_bit(once: Any, alone: dict[str, Any]):
    outcome = once("trainer.py", *options(**CHECKPOINTED))
    same_after_resuming(alone, outcome)
    same_adapter(alone["folder"], outcome.folder / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_trainers_fsdp_is_one_process_and_resumes_bit_for_bit(once: Any, alone: dict[str, Any], kind: str):
    efficient = kind == "SHARDED_STATE_DICT"  # as Accelerate's questionnaire sets it
    config = {**SHARDED, "state_dict_type": kind, "cpu_ram_efficient_loading": efficient}
    outcome = once("trainer.py", *options(fsdp=True, fsdp_config=config))
    same_after_resuming(alone, outcome)
    assert outcome["whole"]["wrapped"].startswith("FSDP")
    same_adapter(alone["folder"], outcome.folder / "saved")


@pytest.mark.slow
def test_trainers_fsdp_in_half_precision_resumes_bit_for_bit(once: Any, alone: dict[str, Any]):
    outcome = once("trainer.py", *options(fsdp=True, fsdp_config=SHARDED, bf16=True))
    # In bfloat16, losses near 4 have steps of 1/64, and a rank that is kept elsewhere changes all later losses.
    same_after_resuming(alone, outcome, atol=0.1, moved=2)


@pytest.mark.slow
def test_accelerate_launch_is_one_process(
    tmp_path: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # Accelerate's own --cpu starts only one process
    launch("accelerated.py", tmp_path, with_=ACCELERATE)
    outcome = Outcome(tmp_path)
    same_run(alone, outcome["accelerated"])
    same_adapter(alone["folder"], tmp_path / "saved")


@pytest.mark.slow
def test_accelerate_launch_with_fsdp2_is_one_process(
    tmp_path: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch("accelerated.py", tmp_path, with_=ACCELERATE_FSDP)
    outcome = Outcome(tmp_path)
    assert outcome["accelerated"]["wrapped"].startswith("FSDP")
    same_run(alone, outcome["accelerated"])
    same_adapter(alone["folder"], tmp_path / "saved")


# `pytest -s tests/parallel/test_distributed.py -m slow -k difference` prints the size of the difference.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "case", "folder"),
    [
        ("ddp.py", "False-False-False", "False-False-False"),
        ("fsdp2.py", "float32", "float32"),
        ("zero.py", "stage 2", "stage-2"),
        ("zero.py", "stage 3", "stage-3"),
    ],
    ids=["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"],
)
def test_the_difference_between_one_process_and_two_is_rounding(
    once: Any, alone: dict[str, Any], request: pytest.FixtureRequest, script: str, case: str, folder: str
):
    if script == "zero.py":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    outcome = once(script)
    two = outcome[case]
    of_losses = max(abs(a - b) for a, b in zip(alone["losses"], two["losses"], strict=True))
    adapters = [
        load_file(each / "adapter_model.safetensors") for each in (alone["folder"], outcome.folder / folder)
    ]
    of_parameters = max(
        float((one - adapters[1][key]).abs().max()) for key, one in adapters[0].items() if one.numel()
    )
    equal = two["history"] == alone["history"]
    name = request.node.callspec.id
    print(
        f"\n{name}: ranks {'equal' if equal else 'differ'} at all {len(two['history'])} allocations; greatest "
        f"difference of a loss {of_losses:.1e} (losses {alone['losses'][0]:.3f} to {alone['losses'][-1]:.3f}), "
        f"of a parameter {of_parameters:.1e}"
    )
    assert equal and of_losses < 1e-5 and of_parameters < 1e-4
