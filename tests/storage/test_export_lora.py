"""An AdaLoRA adapter is exported to plain LoRA, which gives the same outputs in PEFT and in every server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rankwise as rw
from tiny import bert, llama, mix_ranks, token_batches

peft = pytest.importorskip("peft")


class Vision(nn.Module):
    """A user's own model with convolutions, one of them grouped, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 4)
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        image = self.words(ids).permute(0, 3, 1, 2)
        return self.head(self.grouped(self.conv(image)).mean((2, 3)))


def _pruned(model: nn.Module, targets: list[str], rank_0: str, **options: Any) -> Any:
    """An adapter with visible weights, different ranks, and one layer at rank 0."""
    config = rw.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, lora_alpha=6, target_modules=targets, **options
    )
    adapted = rw.get_peft_model(model, config)
    mix_ranks(adapted, lambda number, path: 0 if path.endswith(rank_0) else 1 + number % 4)
    return adapted.eval()


@pytest.mark.parametrize("form", ["principal", True])
def test_llama_export_gives_the_same_logits_in_peft_merged_and_not(form: Any, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    model = _pruned(llama(), targets, "layers.1.self_attn.v_proj", init_lora_weights=form)
    batch = token_batches(1)[0]
    expected = model(**batch).logits
    rw.save_as_lora(tmp_path, model)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    ours = rw.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(ours(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_export_of_a_folder_equals_export_of_the_model(tmp_path: Path) -> None:
    model = _pruned(llama(), ["q_proj", "o_proj"], "layers.0.self_attn.o_proj")
    rw.save_as_lora(tmp_path / "from_model", model)
    model.save_pretrained(tmp_path / "adalora")
    rw.save_as_lora(tmp_path / "from_folder", tmp_path / "adalora")
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("from_model", "from_folder")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_layer_at_rank_0_has_no_tensors_and_is_not_a_target(tmp_path: Path) -> None:
    rw.save_as_lora(tmp_path, _pruned(llama(), ["q_proj", "v_proj"], "layers.1.self_attn.v_proj"))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("layers.1.self_attn.v_proj" in key for key in tensors)
    assert (
        "model.layers.1.self_attn.v_proj"
        not in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    )
    assert len(peft.PeftConfig.from_pretrained(tmp_path).target_modules) == 3


@pytest.mark.parametrize(
    "server", ["alpha / r for all layers, as in vLLM", "alpha / own rank, as in llama.cpp"]
)
def test_padded_export_is_right_however_a_server_scales(tmp_path: Path, server: str) -> None:
    model = _pruned(llama(), ["q_proj", "v_proj"], "layers.1.self_attn.v_proj")
    batch = token_batches(1)[0]
    expected = model(**batch).logits
    config = rw.save_as_lora(tmp_path, model, pad=True)
    base = llama()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in tensors:
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            rank = config.r if "vLLM" in server else len(A)
            base.get_submodule(path).weight.data += config.lora_alpha / rank * (B @ A)
    torch.testing.assert_close(base(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_convolutions_grouped_too_and_embeddings_export(tmp_path: Path) -> None:
    model = _pruned(Vision(), ["words", "conv", "grouped", "head"], "nothing")
    ids = torch.arange(2 * 5 * 6).view(2, 5, 6) % 10
    expected = model(ids)
    rw.save_as_lora(tmp_path, model)
    with pytest.warns(UserWarning, match="groups"):  # PEFT warns that it can't merge these
        loaded = peft.PeftModel.from_pretrained(Vision(), tmp_path).eval()
    torch.testing.assert_close(loaded(ids), expected, atol=1e-5, rtol=1e-5)


def test_a_classification_head_is_exported_too(tmp_path: Path) -> None:
    model = _pruned(bert(), ["query", "value"], "layer.0.attention.self.value", task_type="SEQ_CLS")
    model.classifier.modules_to_save["default"].weight.data.normal_()
    batch = {"input_ids": token_batches(1)[0]["input_ids"]}
    expected = model(**batch).logits
    rw.save_as_lora(tmp_path, model)
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_another_adapter_is_replaced_only_on_request(tmp_path: Path) -> None:
    model = _pruned(llama(), ["q_proj"], "nothing")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        rw.save_as_lora(tmp_path, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    rw.save_as_lora(tmp_path, tmp_path, overwrite=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_plain_lora_with_patterns_and_rslora_gets_the_scale_1(tmp_path: Path) -> None:
    """A server that supports neither then gives the same logits."""
    options = {"rank_pattern": {"layers.1.*": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    config = rw.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    model = rw.get_peft_model(llama(), config).eval()
    written = rw.save_as_lora(tmp_path, model)
    assert not written.use_rslora and written.lora_alpha == written.r
    assert written.alpha_pattern == written.rank_pattern
    batch = token_batches(1)[0]
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_adapters_that_cannot_be_exported_are_refused(tmp_path: Path) -> None:
    empty = _pruned(llama(), ["q_proj"], "q_proj", init_lora_weights=True)
    with pytest.raises(ValueError, match="rank 0 in all layers"):
        rw.save_as_lora(tmp_path / "x", empty)
    with pytest.raises(FileNotFoundError):
        rw.save_as_lora(tmp_path / "x", tmp_path / "missing")
    assert not (tmp_path / "x").exists()
