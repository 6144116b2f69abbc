"""Adapter files that name layers as an older version of Transformers did."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import rankwise as rw

SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
IDS = {"input_ids": torch.arange(3, 15).view(2, 6)}


def qwen2_vl() -> Any:
    torch.manual_seed(0)
    vision = dict(depth=1, embed_dim=16, num_heads=2, hidden_size=16, patch_size=4)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**SIZES, "rope_parameters": rope}
    tokens = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    return Qwen2VLForConditionalGeneration(config).eval()


def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=60)
    ).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()


def qwen2_moe() -> Any:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1,
        shared_expert_intermediate_size=8,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config).eval()


def saved_by_peft(model: Any, folder: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
        peft.get_peft_model(model, config).save_pretrained(folder)


def renamed(folder: Path, *rules: tuple[str, str]) -> int:
    """Give the file's tensors their older names. Return the number of changed names."""
    tensors = load_file(folder / "adapter_model.safetensors")
    old = {}
    for name, tensor in tensors.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        old[name] = tensor
    save_file(old, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return len(old.keys() - tensors.keys())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**IDS).logits


def by_peft(base: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder).eval()


CASES = {
    "qwen2-vl": (qwen2_vl, dict(target_modules=["q_proj", "v_proj", "qkv"]),
                 [(r"model\.model\.language_model\.", "model.model."), (r"model\.model\.visual\.", "model.visual.")]),
    "qwen2-vl, an expression": (qwen2_vl, dict(target_modules=r"model.language_model.layers.1..*\.q_proj"),
                 [(r"model\.model\.language_model\.", "model.model.")]),
    "llava": (llava, dict(target_modules=["q_proj", "linear_1"], rank_pattern={"linear_1": 4}),
              [(r"model\.model\.language_model\.", "model.language_model.model."),
               (r"model\.model\.vision_tower\.", "model.vision_tower.vision_model."),
               (r"model\.model\.multi_modal", "model.multi_modal")]),
    "llava, a whole module": (llava, dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
              [(r"model\.model\.language_model\.", "model.language_model.model."),
               (r"model\.model\.vision_tower\.", "model.vision_tower.vision_model."),
               (r"model\.lm_head", "model.language_model.lm_head")]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layers_that_were_renamed_are_found_and_saved_under_their_current_names(
    case: str, tmp_path: Path
) -> None:
    base, options, rules = CASES[case]
    saved_by_peft(base(), tmp_path / "now", **options)
    saved_by_peft(base(), tmp_path / "before", **options)
    for file in ("adapter_model.safetensors", "adapter_config.json"):  # both begin with the same letters
        (tmp_path / "before" / file).write_bytes((tmp_path / "now" / file).read_bytes())
    assert renamed(tmp_path / "before", *rules) > 0
    wanted = logits(by_peft(base(), tmp_path / "now"))
    assert not torch.allclose(wanted, logits(base()))
    model = rw.PeftModel.from_pretrained(base(), tmp_path / "before")
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "again")
    again = rw.PeftModel.from_pretrained(base(), tmp_path / "again")
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(by_peft(base(), tmp_path / "again")), wanted, atol=1e-5, rtol=0)


def experts_of_before(folder: Path, kind: str, leave_out: str = "", **more: Any) -> None:
    """Write a file of Transformers 4 for a mixture of experts, with adapters on each expert's layers."""
    generator = torch.Generator().manual_seed(7)
    holder = {"mixtral": "block_sparse_moe", "qwen2_moe": "mlp"}[kind]
    gate, up, down = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}[kind]
    inner = {"mixtral": 32, "qwen2_moe": 8}[kind]
    tensors = {}

    def add(path: str, d_in: int, d_out: int) -> None:
        tensors[f"base_model.model.model.{path}.lora_A.weight"] = torch.randn(2, d_in, generator=generator)
        tensors[f"base_model.model.model.{path}.lora_B.weight"] = torch.randn(d_out, 2, generator=generator)

    for layer in range(2):
        add(f"layers.{layer}.self_attn.q_proj", 16, 16)
        for expert in range(4):
            for name, d_in, d_out in ((gate, 16, inner), (up, 16, inner), (down, inner, 16)):
                if name != leave_out:
                    add(f"layers.{layer}.{holder}.experts.{expert}.{name}", d_in, d_out)
    if kind == "qwen2_moe":
        for layer in range(2):  # layers of the same names that are layers still
            for name, d_in, d_out in ((gate, 16, inner), (up, 16, inner), (down, inner, 16)):
                add(f"layers.{layer}.mlp.shared_expert.{name}", d_in, d_out)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = [name for name in ("q_proj", gate, up, down) if name != leave_out]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": names, **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def updates_of_before(folder: Path, scale: float) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = {name.rpartition(".lora_")[0] for name in tensors}
    return {
        path.removeprefix("base_model.model."): scale
        * (tensors[f"{path}.lora_B.weight"].double() @ tensors[f"{path}.lora_A.weight"].double())
        for path in paths
    }


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("leave_out", ["", "w3", "w2"])
def test_adapters_of_mixtrals_experts_become_one_of_their_stack(
    leave_out: str, use_rslora: bool, tmp_path: Path
) -> None:
    experts_of_before(tmp_path / "before", "mixtral", leave_out, use_rslora=use_rslora)
    model = rw.PeftModel.from_pretrained(mixtral(), tmp_path / "before")
    before = updates_of_before(tmp_path / "before", 6 / 2**0.5 if use_rslora else 3)
    merged, base = model.merge_and_unload(), mixtral()
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        own = f"model.layers.{layer}.block_sparse_moe.experts"
        for number in range(4):
            parts = [before.get(f"{own}.{number}.{name}", torch.zeros(32, 16)) for name in ("w1", "w3")]
            down = before.get(f"{own}.{number}.w2", torch.zeros(16, 32))
            for name, wanted in (("gate_up_proj", torch.cat(parts)), ("down_proj", down)):
                found = merged.get_parameter(f"{experts}.{name}") - base.get_parameter(f"{experts}.{name}")
                torch.testing.assert_close(found[number].double(), wanted.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_experts_under_older_names_compute_the_same_as_in_peft(kind: str, tmp_path: Path) -> None:
    base = {"mixtral": mixtral, "qwen2_moe": qwen2_moe}[kind]
    experts_of_before(tmp_path / "before", kind)
    model = rw.PeftModel.from_pretrained(base(), tmp_path / "before")
    if kind == "mixtral":  # in other models PEFT takes the shared expert's layers for experts
        wanted = logits(by_peft(base(), tmp_path / "before"))
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = rw.PeftModel.from_pretrained(base(), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        logits(by_peft(base(), tmp_path / "again")), logits(model), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(logits(model), logits(base()), atol=1e-2)


def test_a_router_under_its_older_name_is_adapted_as_a_parameter(tmp_path: Path) -> None:
    experts_of_before(tmp_path / "before", "mixtral")
    tensors = load_file(tmp_path / "before" / "adapter_model.safetensors")
    path = "base_model.model.model.layers.0.block_sparse_moe.gate"
    tensors |= {f"{path}.lora_A.weight": torch.ones(2, 16), f"{path}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "before" / "adapter_model.safetensors", metadata={"format": "pt"})
    model, base = rw.PeftModel.from_pretrained(mixtral(), tmp_path / "before").merge_and_unload(), mixtral()
    name = "model.layers.0.mlp.gate.weight"
    torch.testing.assert_close(model.get_parameter(name) - base.get_parameter(name), torch.full((4, 16), 6.0))


def test_another_models_file_is_refused_by_its_own_names(tmp_path: Path) -> None:
    experts_of_before(tmp_path / "before", "mixtral")
    model = qwen2_vl()
    with pytest.raises(ValueError, match=r"block_sparse_moe\.experts.*which the model does not have"):
        rw.PeftModel.from_pretrained(model, tmp_path / "before")
    assert not hasattr(model, "peft_config")


def test_experts_of_another_size_are_refused(tmp_path: Path) -> None:
    experts_of_before(tmp_path / "before", "mixtral")
    torch.manual_seed(0)
    narrow = MixtralForCausalLM(MixtralConfig(**{**SIZES, "intermediate_size": 8}, num_local_experts=4))
    with pytest.raises(ValueError, match="belongs to another model"):
        rw.PeftModel.from_pretrained(narrow, tmp_path / "before")
