"""AdaLoRA's default form is saved as plain LoRA, which other libraries read as it is."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.storage.lora_layout import ranks_and_alphas
from tiny import llama, mix_ranks, token_batches

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Nested(nn.Module):
    """Layers whose paths are the ends of other paths."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(6, 6))
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.outer = nn.ModuleDict({"block": nn.Sequential(nn.Linear(6, 6))})

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.outer["block"](self.block(self.get_submodule("0")(x)))
        return output


def nested() -> Any:
    torch.manual_seed(0)
    return Nested().eval()


def adapted(model: Any, ranks: dict[str, int]) -> Any:
    """AdaLoRA in the default form with these ranks, and visible values."""
    torch.manual_seed(1)
    config = rw.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, total_step=9, target_modules="all-linear")
    model = rw.get_peft_model(model, config).eval()
    mix_ranks(model, lambda _, path: ranks[path])
    return model


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def output(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(X)
    return found


def loaded_by_peft(base: Any, folder: Path) -> Any:
    """The model loaded by PEFT. No tensor may be missing or left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize(
    "ranks",
    [
        {"0": 2, "block.0": 0, "block.2": 1, "outer.block.0": 3},
        {"0": 0, "block.0": 2, "block.2": 4, "outer.block.0": 0},
        {"0": 1, "block.0": 4, "block.2": 4, "outer.block.0": 2},
        {"0": 3, "block.0": 0, "block.2": 0, "outer.block.0": 0},
        {"0": 4, "block.0": 4, "block.2": 4, "outer.block.0": 4},
    ],
    ids=str,
)
def test_layers_whose_paths_end_alike_keep_their_own_ranks(ranks: dict[str, int], tmp_path: Path) -> None:
    model = adapted(nested(), ranks)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(loaded_by_peft(nested(), tmp_path)), output(model))
    mine = rw.PeftModel.from_pretrained(nested(), tmp_path)
    torch.testing.assert_close(output(mine), output(model))
    assert {row.path: row.rank for row in mine.rank_summary().layers} == ranks
    assert config_in(tmp_path)["peft_type"] == "LORA"
    names = load_file(tmp_path / "adapter_model.safetensors")
    held = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names}
    assert held == {path for path, rank in ranks.items() if rank}
    rw.save_as_lora(tmp_path / "again", tmp_path)
    torch.testing.assert_close(output(loaded_by_peft(nested(), tmp_path / "again")), output(model))


def test_an_adapter_without_any_rank_left_is_saved_and_changes_nothing(tmp_path: Path) -> None:
    ranks = dict.fromkeys(("0", "block.0", "block.2", "outer.block.0"), 0)
    model = adapted(nested(), ranks)
    model.save_pretrained(tmp_path)
    base = output(nested())
    assert torch.equal(output(model), base)
    assert torch.equal(output(loaded_by_peft(nested(), tmp_path)), base)
    mine = rw.PeftModel.from_pretrained(nested(), tmp_path)
    assert torch.equal(output(mine), base)
    assert {row.path: row.rank for row in mine.rank_summary().layers} == ranks


def test_layers_of_different_scales_keep_them(tmp_path: Path) -> None:
    ranks = {"0": 2, "block.0": 4, "block.2": 1, "outer.block.0": 4}
    model = adapted(nested(), ranks)
    for number, pair in enumerate(model._rankwise_controller.factors.pairs):
        pair.scale = (1.5, 0.7, 1.5, 0.1)[number]  # as for layers that were frozen in the middle of the run
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(loaded_by_peft(nested(), tmp_path)), output(model))


def test_patterns_hold_integers_as_integers_and_only_differing_values() -> None:
    found = ranks_and_alphas({"q": (4, 2.0), "k": (1, 2.0), "v": (4, 0.3)})
    assert found == {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"k": 1},
        "alpha_pattern": {"k": 2, "v": 1.2},
        "use_rslora": False,
    }
    assert all(type(value) is int for value in (found["lora_alpha"], found["alpha_pattern"]["k"]))


def test_transformers_reads_plain_lora_by_itself(tmp_path: Path) -> None:
    """By `load_adapter`, and by `AutoModel` from the folder."""
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = rw.AdaLoraConfig(
        init_r=4, target_r=1, total_step=8, tinit=1, tfinal=2, deltaT=1, target_modules="all-linear"
    )
    model = rw.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for batch in token_batches(8):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "adapter")
    ranks = [row.rank for row in model.rank_summary().layers]
    assert 0 in ranks and len(set(ranks)) > 2, "ranks should differ, or the test shows less"
    ids = token_batches(1)[0]["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        named = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(named(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert (plain(input_ids=ids).logits - wanted).abs().max() > 1e-2
        plain.load_adapter(str(tmp_path / "adapter"))
        torch.testing.assert_close(plain(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", ["model", "folder"])
def test_plain_lora_is_padded_and_cast_for_servers_that_need_it(source: str, tmp_path: Path) -> None:
    ranks = {"0": 2, "block.0": 4, "block.2": 0, "outer.block.0": 1}
    model = adapted(nested(), ranks)
    model.save_pretrained(tmp_path / "own")
    config = rw.save_as_lora(
        tmp_path / "padded", model if source == "model" else tmp_path / "own", pad=True, dtype=torch.float64
    )
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (4, 4, {}, {})
    tensors = load_file(tmp_path / "padded/adapter_model.safetensors")
    assert len(tensors) == 2 * 3 and {value.dtype for value in tensors.values()} == {torch.float64}
    torch.testing.assert_close(output(loaded_by_peft(nested(), tmp_path / "padded")), output(model))


def test_training_goes_on_from_a_finished_folder_with_its_ranks(tmp_path: Path) -> None:
    ranks = {"0": 2, "block.0": 4, "block.2": 0, "outer.block.0": 1}
    adapted(nested(), ranks).save_pretrained(tmp_path)
    model = rw.PeftModel.from_pretrained(nested(), tmp_path, is_trainable=True)
    assert model.allocation_state is None
    before = copy.deepcopy(output(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(output(model), before)
    assert {row.path: row.rank for row in model.rank_summary().layers} == ranks


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_peft_and_exports_keep_the_trained_biases_of_layers_at_rank_0(bias: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules="all-linear", bias=bias)  # type: ignore[arg-type]
    model = rw.get_peft_model(nested(), config).eval()
    mix_ranks(model, lambda _, path: 0 if path.startswith("block") else 2)
    with torch.no_grad():
        for layer in model.block.children():
            if isinstance(layer, nn.Linear):
                layer.bias += 1
    model.save_pretrained(tmp_path / "own")
    rw.save_as_lora(tmp_path / "lora", model)
    rw.save_as_lora(tmp_path / "again", tmp_path / "own")
    for folder in ("own", "lora", "again"):
        for load in (peft.PeftModel.from_pretrained, rw.PeftModel.from_pretrained):
            loaded = load(nested(), tmp_path / folder).eval()
            torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-6)


def test_peft_keeps_the_new_rows_of_an_adapted_embedding_that_ended_at_rank_0(tmp_path: Path) -> None:
    def resized(seed: int) -> Any:
        model = llama()
        torch.manual_seed(seed)
        model.resize_token_embeddings(model.config.vocab_size + 4, mean_resizing=False)
        return model.eval()

    config = rw.AdaLoraConfig(init_r=4, target_r=1, total_step=9, target_modules=["embed_tokens", "q_proj"])
    model = rw.get_peft_model(resized(1), config).eval()
    mix_ranks(model, lambda _, path: 0 if "embed" in path else 2)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    last = torch.tensor([[model.config.vocab_size - 1, 1]])
    for load in (peft.PeftModel.from_pretrained, rw.PeftModel.from_pretrained):
        torch.testing.assert_close(load(resized(2), tmp_path).eval()(last).logits, model(last).logits)
