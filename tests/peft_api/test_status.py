"""The reported status of adapted layers and models, also if their layers differ."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import rankwise as rw


def model() -> Any:
    layers = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "b": nn.Conv1d(3, 3, 2), "c": nn.Embedding(5, 4), "d": nn.Linear(4, 2)}
    )
    adapted = rw.get_peft_model(layers, rw.LoraConfig(r=2, target_modules=["a", "b"], modules_to_save=["d"]))
    adapted.add_adapter("other", rw.LoraConfig(r=2, target_modules=["a", "c"]))
    return adapted


def test_each_layer_reports_its_adapters() -> None:
    found = {status.name: status for status in model().get_layer_status()}
    assert {name: each.module_type for name, each in found.items()} == {
        "a": "lora.Linear",
        "b": "lora.Conv1d",
        "c": "lora.Embedding",
        "d": "modules_to_save",
    }
    assert found["a"].available_adapters == ["default", "other"] and found["c"].available_adapters == [
        "other"
    ]
    assert found["a"].requires_grad == {"default": True, "other": False}
    assert found["d"].requires_grad == {"default": True} and found["d"].active_adapters == ["default"]
    assert all(
        each.enabled and each.devices[name] == ["cpu"] for each in found.values() for name in each.devices
    )


def test_the_model_reports_what_its_layers_share_and_where_they_differ() -> None:
    adapted = model()
    status = adapted.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.peft_types == {"default": "LORA", "other": "LORA"} and status.num_adapter_layers == 4
    assert (status.trainable_params, status.total_params) == adapted.get_nb_trainable_parameters()
    assert status.requires_grad == {"default": True, "other": False}
    adapted["a"].adapters_enabled = False
    adapted["a"].lora_A["other"].requires_grad_(True)
    adapted["a"].active_adapters = ["other"]
    changed = rw.get_model_status(adapted)
    assert (changed.enabled, changed.active_adapters) == ("irregular", "irregular")
    assert changed.requires_grad == {"default": True, "other": "irregular"}
    adapted = model()
    adapted.merge_adapter()
    assert adapted.get_model_status().merged_adapters == ["default"]
    adapted["b"].unmerge()
    assert adapted.get_model_status().merged_adapters == "irregular"
    adapted["a"].unmerge()
    with adapted.disable_adapter():
        assert adapted.get_model_status().enabled is False and not adapted.has_active_enabled_adapter
    assert adapted.has_active_enabled_adapter


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="No adapter layers found"):
        rw.get_layer_status(nn.Linear(2, 2))
