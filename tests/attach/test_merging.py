"""Merging adds the update to the base weight. If it can be undone, it is undone to the last bit; or it is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.attach.attachment import adapter_layers
from rankwise.attach.merging import merge, refuse_shared_copies


def adapted(adalora: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    options: dict[str, Any] = {"lora_alpha": 6, "target_modules": ["0", "2"], **changes}
    if adalora:
        config: Any = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=9, **options)
    else:
        config = rw.LoraConfig(r=3, **options)
    model = rw.get_peft_model(model, config).eval()
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B["default"])
    return model


@pytest.mark.parametrize("form", ["lora", "principal", True])
def test_a_merged_weight_is_the_base_plus_scale_times_B_E_A(form: Any) -> None:
    paper = form is True
    model = adapted() if form == "lora" else adapted(adalora=True, init_lora_weights=form)
    expected = {}
    for path, layer in adapter_layers(model).items():
        A, B = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
        if paper:
            nn.init.normal_(layer.lora_E["default"])
        E = layer.lora_E["default"].detach().flatten() if paper else torch.ones(len(A), dtype=A.dtype)
        scale = {"lora": 6 / 3, "principal": 6 / 4, True: 6 / (4 + 1e-5)}[form]
        expected[path] = layer.weight.detach() + scale * B @ torch.diag(E) @ A
    inputs = torch.randn(7, 6, dtype=torch.float64)
    before = model(inputs)
    merge(model, ["default"], safe_merge=True)
    for path, layer in adapter_layers(model).items():
        torch.testing.assert_close(layer.weight.detach(), expected[path], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(inputs), before, rtol=1e-12, atol=1e-12)


def test_merging_inside_of_autocast_rounds_nothing() -> None:
    model = adapted().float()
    layer = adapter_layers(model)["0"]
    expected = layer.weight.detach() + layer.delta_weight("default").detach()
    with torch.autocast("cpu", torch.bfloat16):
        merge(model, ["default"], safe_merge=True)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=1e-6)


def test_only_the_named_adapters_are_merged() -> None:
    model = adapted()
    model.add_adapter("other", rw.LoraConfig(r=2, target_modules=["2"], init_lora_weights=False))
    model.set_adapter("other")
    weights = [layer.weight.detach().clone() for layer in adapter_layers(model).values()]
    merge(model, ["other"], safe_merge=False)
    after = [layer.weight.detach() for layer in adapter_layers(model).values()]
    assert torch.equal(after[0], weights[0]) and not torch.equal(after[1], weights[1])


def test_values_that_are_not_finite_are_refused_by_name_before_any_weight_changes() -> None:
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        adapter_layers(model)["2"].lora_A["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="'2'"):
        merge(model, ["default"], safe_merge=True)
    assert torch.equal(model[0].weight, before["0.weight"]) and torch.equal(
        model[2].weight, before["2.weight"]
    )


def test_a_weight_that_another_module_shares_is_refused_with_both_names() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    model["second"].weight = model["first"].weight
    rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match="'first' is shared with 'second'"):
        merge(model, ["default"], safe_merge=False)


def test_a_copy_is_not_put_in_place_of_a_module_that_shares_weights() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4), "tied": nn.Linear(4, 4)})
    model["tied"].weight = model["head"].weight
    rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match="'head.*is shared with 'tied"):
        refuse_shared_copies(model, ["default"])
    refuse_shared_copies(model, [])


class Cosine(nn.Linear):
    """A linear layer of another weight than its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


@pytest.mark.parametrize("layer", [Cosine(4, 4), nn.Embedding(9, 4, max_norm=1.0)])
def test_weights_that_a_layer_changes_before_it_uses_them_are_not_merged_into(layer: nn.Module) -> None:
    before = copy.deepcopy(layer.state_dict())
    model = rw.get_peft_model(nn.Sequential(layer), rw.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"'0': .*Keep the adapter unmerged"):
        merge(model, ["default"], safe_merge=False)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())
