"""EVA's start: against singular values in float64, in many processes, and what it refuses."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw

WIDTH = 12


def uneven_data(seed: int = 0, count: int = 60) -> Tensor:
    """Inputs (count, WIDTH) off centre, with variances that are well apart, along directions of no axis."""
    generator = torch.Generator().manual_seed(seed)
    turned, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)))
    spread = 3.0 * 0.5 ** torch.arange(WIDTH)
    return (torch.randn(count, WIDTH, generator=generator) * spread) @ turned + 5.0


def components(data: Tensor, rank: int) -> Tensor:
    """The first principal components, (rank, WIDTH), in float64."""
    data = data.double()
    _, _, right = torch.linalg.svd(data - data.mean(0), full_matrices=False)
    return right[:rank]


def adapted(config: Any | None = None) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    return rw.get_peft_model(model, config or rw.AdaLoraConfig(init_r=4, target_r=2, target_modules=["0"]))


def assert_rows_are(A: Tensor, expected: Tensor) -> None:
    cosines = (A.detach().double() * expected).sum(1).abs()
    assert torch.allclose(cosines, torch.ones(len(expected), dtype=torch.float64), atol=5e-3), cosines


@pytest.mark.parametrize(
    "config",
    [
        rw.AdaLoraConfig(init_r=4, target_r=2, target_modules=["0"]),
        rw.LoraConfig(r=4, target_modules=["0"]),
        rw.LoraConfig(r=4, target_modules=["0"], init_lora_weights="gaussian"),
    ],
    ids=["gated", "lora", "gaussian"],
)
def test_rows_of_A_are_the_principal_components_of_the_input(config: Any):
    data = uneven_data()
    model = rw.initialize_lora_eva_weights(adapted(config), data.split(20))
    A = model[0].lora_A["default"]
    assert_rows_are(A, components(data, 4))
    assert torch.allclose(A @ A.T, torch.eye(4), atol=1e-5)


def test_the_model_still_is_its_base_and_trains_on():
    model, data = adapted(), uneven_data()
    model.train()
    expected = nn.Sequential(nn.Linear(WIDTH, 8), nn.Identity(), nn.Linear(8, 3))
    base = {key: value for key, value in model.state_dict().items() if key in expected.state_dict()}
    expected.load_state_dict(base)
    rw.initialize_lora_eva_weights(model, [data])
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(model(data), expected(data))
    model.train()
    model(data).square().mean().backward()
    assert model[0].lora_B["default"].grad.any() and model[0].lora_A["default"].requires_grad


def test_only_as_many_batches_are_taken_as_asked_for():
    taken = []

    def batches() -> Any:
        for number in itertools.count():
            taken.append(number)
            yield uneven_data(number)

    model = rw.initialize_lora_eva_weights(adapted(), batches(), batches=3)
    assert taken == [0, 1, 2]
    assert_rows_are(model[0].lora_A["default"], components(torch.cat([uneven_data(n) for n in range(3)]), 4))


def test_padding_is_left_out_and_batches_are_passed_by_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, 3)

        def forward(self, values: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(values)

    data = uneven_data(count=40).view(4, 10, WIDTH)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[:, 7:] = 0
    padded = torch.where(mask[..., None].bool(), data, torch.tensor(1e4))
    config = rw.LoraConfig(r=3, target_modules=["inner"])
    model: Any = rw.get_peft_model(Named(), config)
    rw.initialize_lora_eva_weights(model, [{"values": padded, "attention_mask": mask}])
    assert_rows_are(model.inner.lora_A["default"], components(data[mask.bool()], 3))


def test_a_real_language_model_starts_from_its_data_under_half_precision_and_checkpointing():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    model.gradient_checkpointing_enable()
    model = rw.get_peft_model(model, rw.AdaLoraConfig(init_r=4, target_r=2, target_modules="all-linear"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 50, (4, 9))
    rw.initialize_lora_eva_weights(model, [{"input_ids": ids, "labels": ids}])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".lora_A." in name), name


def test_more_ranks_than_inputs_and_layers_no_batch_reaches_keep_what_they_have():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 5), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = rw.get_peft_model(Half(), rw.LoraConfig(r=4, target_modules=["used", "idle"]))
    idle, last = model.idle.lora_A["default"].clone(), model.used.lora_A["default"][3].clone()
    rw.initialize_lora_eva_weights(model, [torch.randn(20, 3)])
    A = model.used.lora_A["default"]
    assert torch.equal(model.idle.lora_A["default"], idle) and torch.equal(A[3], last)
    assert torch.allclose(A[:3] @ A[:3].T, torch.eye(3), atol=1e-5)


def test_convolutions_and_embeddings_keep_their_start():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6))
    model = rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["0", "1"]))
    before = model[0].lora_A["default"].clone()
    rw.initialize_lora_eva_weights(model, [torch.randint(0, 9, (4, 5))])
    assert torch.equal(model[0].lora_A["default"], before)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"adapter_name": "other"}, ValueError, "no adapter 'other'"),
        ({"batches": 0}, ValueError, "at least 1"),
        ({"batches": 2.0}, TypeError, "whole number"),
        ({"dataloader": []}, ValueError, "no batch"),
        ({"dataloader": 5}, TypeError, "must give batches, but is int"),
        ({"dataloader": [torch.full((2, WIDTH), float("nan"))]}, ValueError, "'0' holds NaN"),
        ({"forward_fn": lambda model, batch: None}, ValueError, "No batch reached"),
        ({"model": "model"}, TypeError, "torch.nn.Module"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    change: dict[str, Any], error: type[Exception], words: str
):
    model = adapted()
    before = model[0].lora_A["default"].clone()
    with pytest.raises(error, match=words):
        rw.initialize_lora_eva_weights(**{"model": model, "dataloader": [uneven_data()], **change})
    assert torch.equal(model[0].lora_A["default"], before)
    assert not model[0]._forward_pre_hooks and model.training


def test_a_trained_adapter_and_the_papers_form_are_refused():
    trained = adapted()
    with torch.no_grad():
        trained[0].lora_B["default"].add_(1)
    paper = adapted(
        rw.AdaLoraConfig(init_r=4, target_r=2, target_modules=["0"], init_lora_weights=True, total_step=9)
    )
    for model in (trained, paper):
        with pytest.raises(ValueError, match="has been trained, or is the paper's form"):
            rw.initialize_lora_eva_weights(model, [uneven_data()])


def _one_of_two(rank: int, folder: str, queue: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = adapted()
    with torch.no_grad():
        model[0].lora_A["default"].add_(rank)  # as if every process had drawn its own
    rw.initialize_lora_eva_weights(model, [uneven_data(rank)])
    queue.put((rank, model[0].lora_A["default"].detach().numpy()))
    torch.distributed.destroy_process_group()


def test_processes_with_their_own_batches_get_the_start_of_all_of_them(tmp_path: Path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_one_of_two, args=(rank, str(tmp_path), queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert (found[0] == found[1]).all()
    both = torch.cat([uneven_data(0), uneven_data(1)])
    assert_rows_are(torch.from_numpy(found[0]), components(both, 4))
