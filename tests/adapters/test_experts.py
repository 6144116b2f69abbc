"""LoRA on the experts of a mixture, which are parameters and not layers."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

import rankwise as rw
from expert_world import EXPERTS, FAMILIES, some_tokens, tiny_moe
from rankwise.adapters.summed import SummedWeight

WAYS = ("eager", "batched_mm", "grouped_mm")


def lora(model: Any, **options: Any) -> Any:
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj"], "target_parameters": EXPERTS}
    torch.manual_seed(1)
    return rw.get_peft_model(model, rw.LoraConfig(**{**fields, "init_lora_weights": False, **options}))


def peft_lora(model: Any, **options: Any) -> Any:
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj"], "target_parameters": EXPERTS}
    torch.manual_seed(1)
    return peft.get_peft_model(
        model, peft.LoraConfig(**{**fields, "init_lora_weights": False, **options})
    ).eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model(some_tokens()).logits.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# Files, in both directions


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    ("family", "way"),
    [*[("mixtral", way) for way in WAYS], ("gpt_oss", "eager"), ("gpt_oss", "batched_mm"),
     *[(family, None) for family in FAMILIES[1:]]],
)  # fmt: skip
def test_files_are_exchanged_with_peft_with_equal_logits_merged_and_not(
    family: str, way: str | None, tmp_path: Path
) -> None:
    theirs = peft_lora(
        tiny_moe(family, way), rank_pattern={"experts.down_proj": 2}, alpha_pattern={"gate_up_proj": 7}
    )
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs(some_tokens()).logits
    assert (wanted - tiny_moe(family, way)(some_tokens()).logits).abs().max() > 0.01

    mine = rw.PeftModel.from_pretrained(tiny_moe(family, way), tmp_path / "theirs")
    torch.testing.assert_close(mine(some_tokens()).logits, wanted, atol=1e-6, rtol=1e-5)
    mine.save_pretrained(tmp_path / "mine")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "mine"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    back = peft.PeftModel.from_pretrained(tiny_moe(family, way), tmp_path / "mine").eval()
    assert torch.equal(back(some_tokens()).logits, wanted)
    merged = mine.merge_and_unload()
    torch.testing.assert_close(merged(some_tokens()).logits, wanted, atol=1e-6, rtol=1e-5)
    assert not any("adapted" in key or "lora" in key for key in merged.state_dict())


def test_router_and_experts_of_one_model_are_exchanged_with_peft(tmp_path: Path) -> None:
    names = ["mlp.gate.weight", "experts.down_proj"]
    theirs = peft_lora(tiny_moe(), target_modules=[], target_parameters=names)
    theirs.save_pretrained(tmp_path)
    mine = rw.PeftModel.from_pretrained(tiny_moe(), tmp_path)
    torch.testing.assert_close(mine(some_tokens()).logits, theirs(some_tokens()).logits, atol=1e-6, rtol=1e-5)


def test_a_file_names_the_parameters_in_the_order_that_its_nesting_has(tmp_path: Path) -> None:
    lora(tiny_moe(), target_parameters=EXPERTS[::-1]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"] == EXPERTS


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        model(some_tokens(), labels=some_tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    whole = lora(tiny_moe())
    optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.1)
    step(whole, optimizer)
    whole.save_pretrained(tmp_path, training_state=True)
    step(whole, optimizer)
    resumed = rw.PeftModel.from_pretrained(tiny_moe(), tmp_path, is_trainable=True)
    step(resumed, torch.optim.SGD([p for p in resumed.parameters() if p.requires_grad], lr=0.1))
    resumed.eval(), whole.eval()
    assert torch.equal(resumed(some_tokens()).logits, whole(some_tokens()).logits)


# Results, and the operations that give them


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_peft(way: str, tmp_path: Path) -> None:
    theirs = peft_lora(tiny_moe("mixtral", way))
    theirs.save_pretrained(tmp_path)
    mine = rw.PeftModel.from_pretrained(tiny_moe("mixtral", way), tmp_path, is_trainable=True).eval()
    ours, peft_ones = gradients(mine), gradients(theirs)
    A = peft_ones["base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.default.weight"]
    B = peft_ones["base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.default.weight"]
    place = "model.layers.1.mlp.experts.adapted_parameters.gate_up_proj"
    torch.testing.assert_close(ours[f"{place}.lora_A.default"], A)
    torch.testing.assert_close(
        ours[f"{place}.lora_B.default"], B.view(len(B), 3, 4).transpose(1, 2).reshape(B.shape)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_models_trains_without_forming_a_weight(family: str) -> None:
    model = lora(tiny_moe(family))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a formed weight would give such a warning
        found = gradients(model)
    assert len([name for name in found if "adapted_parameters" in name]) >= 4
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_nothing_as_large_as_the_experts_is_kept_for_the_backward_pass(way: str) -> None:
    model = lora(tiny_moe("mixtral", way, num_local_experts=16, num_hidden_layers=1, hidden_size=64))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    experts = model.model.layers[0].mlp.experts.down_proj.numel()
    sizes = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(some_tokens(1, 3)).logits.sum().backward()
    assert max(sizes) < experts / 4


def test_checkpointed_layers_have_the_same_gradients() -> None:
    model = lora(tiny_moe())
    wanted = gradients(model)
    model.gradient_checkpointing_enable()
    model.train()
    found = gradients(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_half_precision_weights_are_multiplied_in_half_precision(family: str, way: str) -> None:
    model = lora(tiny_moe(family, way).bfloat16())
    layer = model.model.layers[0].mlp.experts.adapted_parameters.down_proj
    assert layer.lora_A["default"].dtype == torch.float32
    found = gradients(model)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
    whole = lora(tiny_moe(family, way))
    difference = model(some_tokens()).logits.float() - whole(some_tokens()).logits
    assert difference.abs().max() < 0.05


def test_autocast_gives_the_same_as_float32_up_to_rounding() -> None:
    model = lora(tiny_moe())
    wanted = model(some_tokens()).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(some_tokens()).logits
    assert (found - wanted).abs().max() < 0.05


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_weights_train_under_autocast(way: str) -> None:
    """As in a Trainer with ``bf16=True`` and a model that was loaded in half precision."""
    model = lora(tiny_moe(implementation=way).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)
        difference = (
            model(some_tokens()).logits.float() - lora(tiny_moe(implementation=way))(some_tokens()).logits
        )
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
    assert difference.abs().max() < 0.05


def test_adapters_switch_add_up_and_leave_the_model_as_it_was() -> None:
    base = tiny_moe()
    before, kind = base(some_tokens()).logits, type(base.model.layers[0].mlp.experts)
    model = lora(base)
    one = model(some_tokens()).logits
    model.add_adapter("second", rw.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS[:1],
                                              init_lora_weights=False))  # fmt: skip
    assert torch.equal(model(some_tokens()).logits, one)
    model.set_adapter("second")
    two = model(some_tokens()).logits
    model.set_adapter(["default", "second"])
    both = model(some_tokens()).logits
    assert not torch.allclose(both, one) and not torch.allclose(both, two)
    model.merge_adapter()
    torch.testing.assert_close(model(some_tokens()).logits, both, atol=1e-6, rtol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(some_tokens()).logits, before, atol=1e-6, rtol=1e-5)
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(model(some_tokens()).logits, one, atol=1e-6, rtol=1e-5)
    bare = model.unload()
    assert type(bare.model.layers[0].mlp.experts) is kind
    assert list(bare.state_dict()) == list(tiny_moe().state_dict())


def test_copies_and_pickles_have_slots_of_their_own() -> None:
    model = lora(tiny_moe())
    wanted = model(some_tokens()).logits
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(some_tokens()).logits, wanted)
        slot = made.model.layers[0].mlp.experts.adapted_parameters.down_proj
        assert slot.owner is made.model.layers[0].mlp.experts


# The stand-in for a weight


def test_the_sum_is_formed_with_a_warning_if_an_operation_needs_it() -> None:
    base, left, right = torch.randn(2, 3, 4), torch.randn(2, 3, 1), torch.randn(2, 1, 4)
    x = torch.randn(2, 5, 4)
    weight = SummedWeight.make(base, left, right)
    with pytest.warns(UserWarning, match="`einsum`, which needs the weight and its update as one tensor"):
        found = torch.einsum("bni,boi->bno", x, weight)
    torch.testing.assert_close(found, torch.einsum("bni,boi->bno", x, base + left @ right))


def test_products_casts_and_views_of_a_sum_are_those_of_the_formed_weight() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(3, 6, 4).double(), torch.randn(3, 6, 2).double(), torch.randn(3, 2, 4).double()]
    weight, formed = SummedWeight.make(*parts), parts[0] + parts[1] @ parts[2]
    x, rows = torch.randn(5, 4).double(), torch.tensor([0, 2, 2, 1, 0])
    for say in (
        lambda w: F.linear(x, w[1]),
        lambda w: F.linear(x, w[torch.tensor(2)], torch.ones(6).double()),
        lambda w: x @ w[0].T,
        lambda w: x @ w[0].t(),
        lambda w: w[1].float() @ x.float().T,
        lambda w: torch.bmm(w[rows], x[:, :, None]),
        lambda w: torch.bmm(x[:, None], w[rows].transpose(1, 2)),
        lambda w: torch.matmul(x, w.mT),
        lambda w: torch.stack([F.linear(x, each) for each in w.unbind(0)]),
        lambda w: w[0][2] * 1,
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(say(weight), say(formed))


def test_a_kernel_that_sees_only_memory_gets_the_formed_weight() -> None:
    model = lora(tiny_moe())
    wanted = model(some_tokens()).logits
    ALL_EXPERTS_FUNCTIONS["kernel"] = grouped_mm_experts_forward
    try:
        model.set_experts_implementation("kernel")
        with pytest.warns(UserWarning, match="experts_implementation='kernel' can't see the adapters"):
            torch.testing.assert_close(model(some_tokens()).logits, wanted, atol=1e-6, rtol=1e-5)
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("kernel", None)
        ALL_EXPERTS_FUNCTIONS._local_mapping.pop("kernel", None)


# Warnings and refusals


def test_all_linear_says_which_experts_it_leaves_out_and_how_to_adapt_them() -> None:
    with pytest.warns(UserWarning, match="experts of this model are not: 4 stacks of weights with") as told:
        rw.get_peft_model(tiny_moe(), rw.LoraConfig(target_modules="all-linear"))
    assert [str(each.message).count(f"`target_parameters={EXPERTS}`") for each in told] == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rw.get_peft_model(tiny_moe(), rw.LoraConfig(target_modules="all-linear", target_parameters=EXPERTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_parameters": ["experts.gate_proj"]},
            "has no such parameter. Did you mean 'experts.gate_up_proj'",
        ),
        (
            {"target_parameters": ["input_layernorm.weight"]},
            "torch.float32 of shape \\(16,\\), but only matrices",
        ),
        ({"target_parameters": ["o_proj.weight"]}, "whose layer .* is adapted already"),
        (
            {"target_parameters": EXPERTS, "modules_to_save": ["mlp"]},
            "all that they match is in modules that train",
        ),
    ],
)
def test_impossible_targets_are_refused_and_the_model_is_unchanged(options: Any, message: str) -> None:
    base = tiny_moe()
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=message):
        lora(base, **options)
    assert [type(module) for module in base.modules()] == kinds
    assert list(base.state_dict()) == list(tiny_moe().state_dict())


def test_a_name_that_matches_nothing_is_reported_if_others_match() -> None:
    with pytest.warns(UserWarning, match="'experts.up_proj', but the model has no such parameter"):
        lora(tiny_moe(), target_parameters=[*EXPERTS, "experts.up_proj"])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_parameters": "experts.down_proj"}, TypeError, "write \\['experts.down_proj'\\]"),
        (
            {"target_parameters": EXPERTS, "lora_dropout": 0.1},
            ValueError,
            "does not work with `target_parameters`",
        ),
        ({"target_modules": []}, ValueError, "`target_modules` is empty"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(
    fields: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rw.LoraConfig(**fields)


def test_a_stack_of_other_data_is_refused() -> None:
    base = tiny_moe()
    base.model.layers[0].mlp.counts = nn.Parameter(
        torch.zeros(2, 3, 4, dtype=torch.int32), requires_grad=False
    )
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.counts': it is torch.int32 of shape \(2, 3, 4\)"
    ):
        lora(base, target_parameters=["mlp.counts"])


def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    lora(tiny_moe()).save_pretrained(tmp_path)
    other = tiny_moe(num_local_experts=8)
    with pytest.raises(ValueError, match="a stack of 4 matrices, but this model's has 8"):
        rw.PeftModel.from_pretrained(other, tmp_path)
    assert list(other.state_dict()) == list(tiny_moe(num_local_experts=8).state_dict())


def test_an_adapter_of_other_widths_is_refused(tmp_path: Path) -> None:
    lora(tiny_moe(), target_modules=[]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="belongs to a model of other shapes"):
        rw.PeftModel.from_pretrained(tiny_moe(intermediate_size=32), tmp_path)
