"""AdaLoRA on experts: each expert has its own ranks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import rankwise as rw
from expert_world import EXPERTS, some_tokens, tiny_moe
from rankwise.recipes import load_recipe, plan_memory
from rankwise.report.grid import rank_grids
from rankwise.report.inspect import inspect_adapter
from rankwise.run.own import kept_ranks

FORMS = ["principal", True]
STEPS = 12


def adalora(model: Any, form: Any = "principal", **options: Any) -> Any:
    fields = {"init_r": 4, "target_r": 2, "total_step": STEPS, "tfinal": 3, "target_modules": ["o_proj"]}
    torch.manual_seed(1)
    config = rw.AdaLoraConfig(
        **{**fields, "target_parameters": EXPERTS, "init_lora_weights": form, **options}
    )
    return rw.get_peft_model(model, config)


def train(model: Any, steps: int, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    made = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(steps):
        model(some_tokens(), labels=some_tokens()).loss.backward()
        made.step()
        made.zero_grad()
    model.eval()
    return made


@pytest.fixture(scope="module", params=FORMS)
def trained(request: pytest.FixtureRequest) -> Any:
    model = adalora(tiny_moe(), request.param)
    train(model, STEPS)
    return model


def ranks(model: Any) -> dict[str, int]:
    return {layer.path: layer.rank for layer in model.rank_summary().layers}


# The budget


def test_every_expert_has_ranks_of_its_own_and_all_meet_the_budget(trained: Any) -> None:
    found = ranks(trained)
    assert len(found) == 2 + 2 * 2 * 4
    assert {f"model.layers.1.mlp.experts.down_proj.{number}" for number in range(4)} < found.keys()
    assert len(set(found.values())) > 1
    if trained.peft_config["default"].init_lora_weights is True:
        assert sum(found.values()) == 2 * len(found)
    whole = rw.get_peft_model(
        tiny_moe(), rw.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=EXPERTS)
    )
    own = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    assert sum(layer.parameters for layer in trained.rank_summary().layers) < 1.1 * own


def test_the_history_names_every_expert_and_ends_with_its_rank(trained: Any) -> None:
    history = trained.rank_history
    assert dict(zip(history.layers, history.records[-1].ranks, strict=True)) == ranks(trained)
    assert set(history.records[0].ranks) == {4}


def test_with_the_ranks_fixed_the_forward_pass_is_that_of_all_triplets_that_stay() -> None:
    model = adalora(tiny_moe())
    train(model, STEPS)  # ranks that are off stay 0
    fixed = model(some_tokens()).logits
    model._rankwise_controller.factors.widen()
    torch.testing.assert_close(fixed, model(some_tokens()).logits, atol=1e-6, rtol=1e-5)


def test_the_penalty_is_the_mean_over_the_factors_of_every_expert() -> None:
    model = adalora(tiny_moe(), True, target_modules=[], orth_reg_weight=0.1)
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            rows = p.detach() if "lora_A" in name else p.detach().T
            norms += [torch.linalg.norm(one @ one.T - torch.eye(4)) for one in rows.split(4)]
    torch.testing.assert_close(model.orthogonal_penalty(), torch.stack(norms).mean())
    slot = model.model.layers[0].mlp.experts.adapted_parameters.down_proj
    A, B = slot.lora_A["default"], slot.lora_B["default"]
    weights = [A.detach().clone(), B.detach().clone()]
    for parameter in (A, B):
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD([A, B], lr=1.0)
    optimizer.step()
    for parameter, before, dim in ((A, weights[0], 0), (B, weights[1], 1)):
        leaf = before.double().requires_grad_()
        parts = [part if dim == 0 else part.T for part in leaf.split(4, dim)]
        (0.1 * sum(torch.linalg.norm(one @ one.T - torch.eye(4)) for one in parts) / len(norms)).backward()
        torch.testing.assert_close(before - parameter.detach(), leaf.grad.float(), atol=1e-6, rtol=1e-4)


# Experts that receive no tokens


class TwoOfEight(nn.Module):
    """Eight experts with a frozen router that sends the task's tokens to two of them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = tiny_moe(
            "qwen3_moe", num_experts=8, num_experts_per_tok=1, num_hidden_layers=1, hidden_size=width
        )
        with torch.no_grad():
            block = self.moe.model.layers[0].mlp
            block.gate.weight[[0, 1, 3, 4, 6, 7]] = 0
            block.gate.weight[2] *= 50
            block.gate.weight[5] = -block.gate.weight[2]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.moe(tokens).logits
        return logits


@pytest.mark.parametrize("form", FORMS)
def test_ranks_stay_with_the_two_experts_of_eight_that_tokens_reach(form: Any) -> None:
    model = TwoOfEight()
    steps = 40
    model = rw.get_peft_model(model, rw.AdaLoraConfig(
        init_r=8, target_r=4, total_step=steps, tinit=5, tfinal=10, init_lora_weights=form,
        target_modules=[], target_parameters=EXPERTS,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    tokens = some_tokens(8, 16)
    for _ in range(steps):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = ranks(model)
    reached = {path: rank for path, rank in found.items() if path.endswith((".2", ".5"))}
    others = {path: rank for path, rank in found.items() if path not in reached}
    assert len(reached) == 4 and len(others) == 12
    assert set(others.values()) == {0}
    assert min(reached.values()) == 8  # the budget is enough for all of their ranks


# Files


def test_a_saved_adapter_is_loaded_exactly_and_saved_again_alike(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "one")
    wanted = trained(some_tokens()).logits
    loaded = rw.PeftModel.from_pretrained(tiny_moe(), tmp_path / "one")
    torch.testing.assert_close(loaded(some_tokens()).logits, wanted, atol=1e-6, rtol=1e-5)
    assert ranks(loaded) == ranks(trained)
    loaded.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(some_tokens()).logits, wanted, atol=1e-6, rtol=1e-5)


def test_a_loaded_adapter_trains_on_with_the_ranks_that_it_has(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    loaded = rw.PeftModel.from_pretrained(tiny_moe(), tmp_path, is_trainable=True)
    before = ranks(loaded)
    assert before == ranks(trained)
    train(loaded, 2)
    assert ranks(loaded) == before
    assert not torch.equal(loaded(some_tokens()).logits, trained(some_tokens()).logits)


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("source", ["model", "folder"])
def test_as_a_lora_it_is_read_by_peft_with_equal_logits(source: str, trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "adalora")
    rw.save_as_lora(tmp_path / "lora", trained if source == "model" else tmp_path / "adalora")
    wanted = trained(some_tokens()).logits
    theirs = peft.PeftModel.from_pretrained(tiny_moe(), tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(some_tokens()).logits, wanted, atol=1e-6, rtol=1e-5)
    mine = rw.PeftModel.from_pretrained(tiny_moe(), tmp_path / "lora")
    torch.testing.assert_close(mine(some_tokens()).logits, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("export", [True, False])
def test_a_stack_at_rank_0_is_left_out_of_the_lora(export: bool, tmp_path: Path) -> None:
    model = adalora(tiny_moe())
    train(model, STEPS)
    controller = model._rankwise_controller
    kept = kept_ranks(controller)
    kept["model.layers.0.mlp.experts.gate_up_proj"][:] = False
    controller.take_over(kept)
    rw.save_as_lora(tmp_path, model) if export else model.save_pretrained(tmp_path)
    stacks = json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    assert "model.layers.0.mlp.experts.gate_up_proj" not in stacks
    assert "model.layers.0.mlp.experts.down_proj" in stacks
    theirs = peft.PeftModel.from_pretrained(tiny_moe(), tmp_path).eval()
    torch.testing.assert_close(
        theirs(some_tokens()).logits, model(some_tokens()).logits, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(form: Any, tmp_path: Path) -> None:
    whole = adalora(tiny_moe(), form)
    optimizer = train(whole, 6)
    whole.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(whole, STEPS - 6, optimizer)
    resumed = rw.PeftModel.from_pretrained(tiny_moe(), tmp_path, is_trainable=True)
    again = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=0.01)
    again.load_state_dict(state)
    train(resumed, STEPS - 6, again)
    assert ranks(resumed) == ranks(whole)
    assert torch.equal(resumed(some_tokens()).logits, whole(some_tokens()).logits)
    assert resumed.rank_history == whole.rank_history


def test_the_values_of_a_checkpoint_can_be_taken_over(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path, training_state=False)
    other = adalora(tiny_moe(), trained.peft_config["default"].init_lora_weights)
    other.load_checkpoint(tmp_path)
    assert ranks(other) == ranks(trained)
    assert torch.equal(other.eval()(some_tokens()).logits, trained(some_tokens()).logits)


def test_an_adapter_of_another_number_of_experts_is_refused(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a stack of 4 matrices, but this model's has 8"):
        rw.PeftModel.from_pretrained(tiny_moe(num_local_experts=8), tmp_path)


def test_a_mask_of_several_matrices_needs_parameters() -> None:
    with pytest.raises(ValueError, match="must have init_r=4 booleans, not 8"):
        rw.AdaLoraConfig(init_r=4, target_r=2, rank_pattern={"a.lora_E": [True] * 8})


def test_inspecting_a_folder_shows_every_expert(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "adalora")
    found = inspect_adapter(tmp_path / "adalora")
    assert {layer.path: layer.rank for layer in found.layers} == ranks(trained)
    assert found.history is not None and not found.notes
    whole = {grid.title: (len(grid.rows), len(grid.columns)) for grid in rank_grids(found.layers)}
    assert whole["model.layers.*.mlp.experts.down_proj"] == (2, 4)
    rw.save_as_lora(tmp_path / "lora", trained)
    largest: dict[str, int] = {}
    for path, rank in ranks(trained).items():
        stack = path.rpartition(".")[0] if "experts" in path else path
        largest[stack] = max(largest.get(stack, 0), rank)
    as_lora = inspect_adapter(tmp_path / "lora").layers
    assert {layer.path: layer.rank for layer in as_lora} == {
        path: largest[path.rpartition(".")[0] if "experts" in path else path] for path in ranks(trained)
    }


# A recipe's plan


def test_the_plan_of_a_recipe_counts_the_experts(tmp_path: Path) -> None:
    tiny_moe("olmoe").save_pretrained(tmp_path / "base")
    recipe = Path(__file__).parents[2] / "recipes" / "mixture-of-experts.yaml"

    def planned(*changes: str) -> Any:
        settings = [f"model={tmp_path / 'base'}", "data.max_length=8", *changes]
        return plan_memory(load_recipe(recipe, settings, data_needed=False))

    with pytest.warns(UserWarning, match="experts of this model are not"):
        without = planned("adapter.target_parameters=null")
    found = planned()
    # A and B of 4 experts in 2 layers, at 8 ranks: 16 wide in and 48 out, and 24 in and 16 out
    assert (found.gradients - without.gradients) // 4 == 2 * 4 * 8 * (16 + 48 + 24 + 16)
    assert found.activations and without.activations
