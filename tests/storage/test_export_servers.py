"""Exports follow the rules of the servers that read them. `make test-servers` runs llama.cpp and vLLM themselves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rankwise as rw
from expert_world import EXPERTS, FAMILIES, tiny_moe
from rankwise.cli import app
from tiny import bert, llama, mix_ranks, token_batches

peft = pytest.importorskip("peft")
PREFIX = "base_model.model."
BATCH = {"input_ids": token_batches(1)[0]["input_ids"]}


def adalora(folder: Path, targets: list[str], rank_0: str = "nothing", **options: Any) -> torch.Tensor:
    """Write an adapter with different ranks, 0 in layers whose paths contain ``rank_0``. Return its logits."""
    config = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=9, lora_alpha=6, target_modules=targets)
    model = rw.get_peft_model(options.pop("model", None) or llama(**options), config)
    mix_ranks(model, lambda number, path: 0 if re.search(rank_0, path) else 1 + number % 4)
    model.save_pretrained(folder)
    return model.eval()(**BATCH).logits.detach()


def of_peft(folder: Path, config: Any, base: Any = None) -> torch.Tensor:
    """Write an adapter with PEFT, with visible weights. Return its logits."""
    model = peft.get_peft_model(base or llama(), config).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or (parameter.requires_grad and "bias" in name):
            parameter.data.normal_(std=0.2, generator=generator)
    model.save_pretrained(folder)
    return model(**BATCH).logits.detach()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logits_of_one_scale(folder: Path) -> torch.Tensor:
    """The logits of a server that reads only ``lora_alpha / r``."""
    config = json.loads((folder / "adapter_config.json").read_text())
    model, tensors = llama(), tensors_of(folder)
    for key, A in tensors.items():
        if key.endswith("lora_A.weight"):
            weight = model.get_submodule(key.removeprefix(PREFIX).removesuffix(".lora_A.weight")).weight
            weight.data += config["lora_alpha"] / config["r"] * tensors[key.replace("lora_A", "lora_B")] @ A
    return model.eval()(**BATCH).logits.detach()


@pytest.mark.parametrize("to", ["peft-lora", "vllm", "sglang"])
@pytest.mark.parametrize("kind", ["adalora", "rslora", "patterns"])
def test_folders_compute_the_same_in_peft_and_with_one_scale(tmp_path: Path, to: Any, kind: str) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    if kind == "adalora":
        expected = adalora(tmp_path / "own", targets, "layers.1.self_attn.v_proj")
    else:
        options: Any = {
            "rslora": {"use_rslora": True},
            "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.0.mlp.down_proj": 20}},
        }[kind]
        expected = of_peft(
            tmp_path / "own", peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, **options)
        )
    rw.export_adapter(tmp_path / "out", tmp_path / "own", to)
    torch.testing.assert_close(logits_of_one_scale(tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    torch.testing.assert_close(loaded(**BATCH).logits, expected, atol=1e-5, rtol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_rslora"]) == ("LORA", False)


def test_the_vllm_command_has_the_smallest_rank_that_vllm_allows(tmp_path: Path) -> None:
    of_peft(tmp_path / "own", peft.LoraConfig(r=17, target_modules=["q_proj"]))
    assert "--max-lora-rank 32 " in rw.export_adapter(tmp_path / "out", tmp_path / "own", "vllm").notes[0]
    of_peft(tmp_path / "large", peft.LoraConfig(r=513, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="at most 512.*compress"):
        rw.export_adapter(tmp_path / "x", tmp_path / "large", "vllm")


def test_for_sglang_every_layer_of_a_kind_is_there_at_one_rank(tmp_path: Path) -> None:
    """Layers at rank 0 are there, too, and so are projections that SGLang joins with adapted ones."""
    adalora(tmp_path / "own", ["q_proj", "k_proj", "up_proj"], r"1\.self_attn\.q_proj|0\.mlp\.up_proj")
    rw.export_adapter(tmp_path / "out", tmp_path / "own", "sglang")
    tensors = tensors_of(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    kinds = ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == kinds and not config["rank_pattern"] and not config["alpha_pattern"]
    for layer in range(2):
        for kind in kinds:
            room = "mlp" if kind in ("gate_proj", "up_proj") else "self_attn"
            path = f"{PREFIX}model.layers.{layer}.{room}.{kind}"
            weight = llama().get_submodule(path.removeprefix(PREFIX)).weight
            assert tensors[f"{path}.lora_A.weight"].shape == (config["r"], weight.shape[1])
            assert tensors[f"{path}.lora_B.weight"].shape == (weight.shape[0], config["r"])


def test_for_sglang_layers_and_projections_that_only_the_base_knows_are_added(tmp_path: Path) -> None:
    llama(num_hidden_layers=3, head_dim=8).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0])
    of_peft(tmp_path / "own", config, llama(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"v_proj.*`--base`"):
        rw.export_adapter(tmp_path / "out", tmp_path / "own", "sglang")
    rw.export_adapter(tmp_path / "out", tmp_path / "own", "sglang", base=tmp_path / "base")
    tensors = tensors_of(tmp_path / "out")
    assert len(tensors) == 3 * 2 * 2
    assert tensors[f"{PREFIX}model.layers.2.self_attn.v_proj.lora_B.weight"].shape == (16, 2)
    peft.PeftModel.from_pretrained(llama(num_hidden_layers=3), tmp_path / "out")


@pytest.mark.parametrize("to", ["vllm", "sglang", "gguf"])
def test_adapters_that_a_server_cannot_load_are_refused_with_a_remedy(tmp_path: Path, to: Any) -> None:
    of_peft(tmp_path / "head", peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    of_peft(
        tmp_path / "bias",
        peft.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"),
        llama(attention_bias=True),
    )
    of_peft(tmp_path / "new", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), bert())
    for name, said in (("head", "lm_head"), ("bias", "a trained bias"), ("new", "trained in full")):
        if (to, name) == ("vllm", "new"):
            continue  # vLLM accepts classifiers
        with pytest.raises(ValueError, match=rf"{said}.*--to merged"):
            rw.export_adapter(tmp_path / "out.gguf", tmp_path / name, to)
    assert not (tmp_path / "out.gguf").exists()


def test_a_trained_head_goes_to_vllm(tmp_path: Path) -> None:
    of_peft(tmp_path / "own", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), bert())
    assert "head" in rw.export_adapter(tmp_path / "out", tmp_path / "own", "vllm").notes[1]
    assert f"{PREFIX}classifier.weight" in tensors_of(tmp_path / "out")


# --- llama.cpp


def test_gguf_has_alpha_0_own_names_and_paired_rows_of_q_and_k(tmp_path: Path) -> None:
    import gguf

    llama().save_pretrained(tmp_path / "base")
    adalora(tmp_path / "own", ["q_proj", "k_proj", "down_proj", "lm_head"], "layers.1.mlp.down_proj")
    rw.export_adapter(tmp_path / "out.gguf", tmp_path / "own", "gguf", base=tmp_path / "base")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["general.architecture"]) == ("adapter", "llama")
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 0.0)
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert not any("blk.1.ffn_down" in name for name in found)
    rw.save_as_lora(tmp_path / "lora", tmp_path / "own")
    tensors = tensors_of(tmp_path / "lora")
    for theirs, ours, heads in (
        ("model.layers.0.self_attn.q_proj", "blk.0.attn_q", 4),
        ("model.layers.1.self_attn.k_proj", "blk.1.attn_k", 2),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down", None),
        ("lm_head", "output", None),
    ):
        A, B = (tensors[f"{PREFIX}{theirs}.lora_{factor}.weight"] for factor in "AB")
        delta = B @ A
        if heads:  # as the converter of the base's weights orders them
            delta = delta.reshape(heads, 2, len(delta) // heads // 2, -1).swapaxes(1, 2).reshape(delta.shape)
        made = found[f"{ours}.weight.lora_b"] @ found[f"{ours}.weight.lora_a"]
        torch.testing.assert_close(made, delta)


def test_qwen_keeps_its_rows_and_an_embedding_is_transposed(tmp_path: Path) -> None:
    import gguf
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(
        Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    )
    model.save_pretrained(tmp_path / "base")
    of_peft(
        tmp_path / "own", peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "embed_tokens"]), model
    )
    rw.export_adapter(
        tmp_path / "out.gguf", tmp_path / "own", "gguf", base=tmp_path / "base", dtype=torch.float16
    )
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    found = {tensor.name: torch.tensor(tensor.data).float() for tensor in reader.tensors}
    tensors = tensors_of(tmp_path / "own")
    q = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"
    torch.testing.assert_close(found["blk.0.attn_q.weight.lora_b"], tensors[f"{q}B.weight"].half().float())
    assert found["token_embd.weight.lora_a"].shape == (64, 3)
    torch.testing.assert_close(
        found["token_embd.weight.lora_a"] @ found["token_embd.weight.lora_b"].T,
        2 * (tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"]
             @ tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"]).T,
        atol=1e-2, rtol=1e-2,
    )  # fmt: skip


def test_gguf_refuses_what_would_be_wrong_in_llama_cpp(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    of_peft(tmp_path / "embedding", peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    of_peft(tmp_path / "own", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    bert().save_pretrained(tmp_path / "bert")
    llama(num_attention_heads=8, num_key_value_heads=8).save_pretrained(tmp_path / "other")
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    for adapter, base, file, said in (
        ("embedding", "tied", "x.gguf", "can't adapt one alone"),
        ("own", "bert", "x.gguf", "not known here"),
        ("own", "short", "x.gguf", "does not have"),
        ("own", "tied", "x", "end in .gguf"),
    ):
        with pytest.raises(ValueError, match=said):
            rw.export_adapter(tmp_path / file, tmp_path / adapter, "gguf", base=tmp_path / base)
    with pytest.raises(FileNotFoundError, match="--base"):
        rw.export_adapter(tmp_path / "x.gguf", tmp_path / "own", "gguf")


# --- merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_equals_merging_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import LlamaForCausalLM

    llama().to(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    adalora(tmp_path / "own", ["q_proj", "down_proj", "embed_tokens"], "layers.1.mlp.down_proj")
    rw.export_adapter(tmp_path / "out", tmp_path / "own", "merged", base=tmp_path / "base")
    expected = rw.PeftModel.from_pretrained(llama().to(dtype), tmp_path / "own").merge_and_unload()
    made = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], tensor, msg=name)


def test_merged_heads_biases_and_bodies_without_a_head_find_their_weights(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification, BertModel

    config = peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only", task_type="SEQ_CLS")
    expected = of_peft(tmp_path / "own", config, bert())
    bert().save_pretrained(tmp_path / "base")
    rw.export_adapter(tmp_path / "out", tmp_path / "own", "merged", base=tmp_path / "base")
    made = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(made(**BATCH).logits, expected, atol=1e-5, rtol=1e-4)
    bert().bert.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match="classifier.*merge_and_unload"):
        rw.export_adapter(tmp_path / "x", tmp_path / "own", "merged", base=tmp_path / "body")
    of_peft(tmp_path / "plain", peft.LoraConfig(r=2, target_modules=["query"]), bert())
    rw.export_adapter(tmp_path / "made", tmp_path / "plain", "merged", base=tmp_path / "body")
    body = BertModel.from_pretrained(tmp_path / "made")
    merged = peft.PeftModel.from_pretrained(bert(), tmp_path / "plain").merge_and_unload()
    path = "encoder.layer.1.attention.self.query"
    torch.testing.assert_close(body.get_submodule(path).weight, merged.bert.get_submodule(path).weight)


def test_merged_gpt2_has_its_transposed_weights_right(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    model.save_pretrained(tmp_path / "base")
    expected = of_peft(tmp_path / "own", peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"]), model)
    rw.export_adapter(tmp_path / "out", tmp_path / "own", "merged", base=tmp_path / "base")
    made = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(made(**BATCH).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["adalora", "peft"])
def test_merged_experts_equal_merging_in_memory(tmp_path: Path, family: str, kind: str) -> None:
    """Files have each expert separately under old names, or all in one tensor, in either orientation."""
    tiny_moe(family).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    if kind == "adalora":
        config = rw.AdaLoraConfig(
            init_r=3, target_r=2, total_step=9, target_modules=["o_proj"], target_parameters=EXPERTS
        )
        model = rw.get_peft_model(tiny_moe(family), config)
        mix_ranks(model, lambda number, path: number % 4)
        model.save_pretrained(tmp_path / "own")
    else:
        options = {"target_modules": ["o_proj"], "target_parameters": EXPERTS}
        config = peft.LoraConfig(r=2, lora_alpha=6, **options)
        of_peft(tmp_path / "own", config, tiny_moe(family))
        written = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
        written["target_parameters"] = EXPERTS[::-1]  # PEFT writes a set, in any order
        (tmp_path / "own" / "adapter_config.json").write_text(json.dumps(written))
    rw.export_adapter(tmp_path / "out", tmp_path / "own", "merged", base=tmp_path / "base")
    base = tiny_moe(family)
    adapted = (rw if kind == "adalora" else peft).PeftModel.from_pretrained(base, tmp_path / "own")
    expected = adapted.merge_and_unload().state_dict()
    made = type(tiny_moe(family)).from_pretrained(tmp_path / "out").state_dict()
    changed = 0
    for name, tensor in tiny_moe(family).state_dict().items():
        torch.testing.assert_close(made[name], expected[name], msg=name)
        changed += not torch.equal(made[name], tensor)
    assert changed >= 2


def test_merged_finds_weights_that_transformers_loads_under_other_names(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"])
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "own")
    path = "vit.layers.1.attention.q_proj"
    assert f"{path}.weight" not in names
    rw.export_adapter(tmp_path / "out", tmp_path / "own", "merged", base=tmp_path / "base")
    pixels = torch.randn(2, 3, 8, 8)
    made = ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(made(pixels).logits, adapted(pixels).logits, atol=1e-5, rtol=1e-4)


def test_an_embedding_shared_by_the_classes_default_is_not_merged_into(tmp_path: Path) -> None:
    """GPT-2's own config.json does not say that its embedding is also its output layer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    of_peft(tmp_path / "own", peft.LoraConfig(r=2, target_modules=["wte"]), model)
    with pytest.raises(ValueError, match="both"):
        rw.export_adapter(tmp_path / "x", tmp_path / "own", "merged", base=tmp_path / "base")


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_whole_module_is_not_merged_into_a_weight_that_another_module_shares(
    kind: str, said: bool, tmp_path: Path
) -> None:
    """Whatever the configuration says, the files hold no separate output layer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = llama(tie_word_embeddings=True) if kind == "llama" else GPT2LMHeadModel(sizes)
    embedding, layer = ("embed_tokens", "q_proj") if kind == "llama" else ("wte", "c_attn")
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["tie_word_embeddings"] = True
    if not said:
        del config["tie_word_embeddings"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    options = {"r": 2, "target_modules": [layer], "modules_to_save": [embedding]}
    of_peft(tmp_path / "own", peft.LoraConfig(**options), model)
    with pytest.raises(ValueError, match=rf"trains '.*{embedding}'.*shares with .*both"):
        rw.export_adapter(tmp_path / "x", tmp_path / "own", "merged", base=tmp_path / "base")
    assert not (tmp_path / "x").exists()


def test_a_whole_embedding_of_an_untied_base_is_merged(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = rw.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False
    )
    model = rw.get_peft_model(llama(), config)
    model.model.embed_tokens.modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(tmp_path / "own")
    rw.export_adapter(tmp_path / "x", tmp_path / "own", "merged", base=tmp_path / "base")
    ids = torch.arange(3, 9)[None]
    merged = type(llama()).from_pretrained(tmp_path / "x")
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=0)


def test_merging_takes_less_memory_than_the_model_has(tmp_path: Path) -> None:
    """A process that may use 80 MB more than at its start merges a file of 160 MB."""
    if sys.platform != "linux":
        pytest.skip("limits of memory are Linux's")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    weight = torch.zeros(10_000, 4_000)
    save_file({"layer.weight": weight}, tmp_path / "base" / "model.safetensors")
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(4_000, 10_000, bias=False, device="meta")})
    model.layer.to_empty(device="cpu")
    adapted = rw.get_peft_model(model, rw.LoraConfig(r=1, lora_alpha=1, target_modules=["layer"]))
    adapted.layer.lora_A["default"].data.fill_(1.0)
    adapted.layer.lora_B["default"].data.copy_(torch.arange(10_000.0)[:, None])
    adapted.save_pretrained(tmp_path / "own")
    code = """if True:
        import resource, sys
        import rankwise as rw
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 80_000_000,) * 2)
        rw.export_adapter(sys.argv[1], sys.argv[2], "merged", base=sys.argv[3])
    """
    words = [str(tmp_path / name) for name in ("out", "own", "base")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = load_file(tmp_path / "out" / "model.safetensors")["layer.weight"]
    assert torch.equal(made[:, 7], torch.arange(10_000.0)) and made.shape == weight.shape


@pytest.mark.parametrize("place", ["own", "other", "base"])
def test_no_merged_model_replaces_an_adapter_or_its_base(tmp_path: Path, place: str) -> None:
    llama().save_pretrained(tmp_path / "base")
    for name in ("own", "other"):
        of_peft(tmp_path / name, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = {path.name: path.read_bytes() for path in (tmp_path / place).iterdir()}
    with pytest.raises(ValueError, match="Give another place"):
        rw.export_adapter(
            tmp_path / place, tmp_path / "own", "merged", base=tmp_path / "base", overwrite=True
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / place).iterdir()} == before


def test_merged_refuses_bases_that_it_would_spoil(tmp_path: Path) -> None:
    of_peft(tmp_path / "own", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    of_peft(tmp_path / "embedding", peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    llama().save_pretrained(tmp_path / "base")
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    llama(hidden_size=16).save_pretrained(tmp_path / "narrow")
    llama().save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"bits": 4}})
    )
    for adapter, base, said in (
        ("own", "narrow", "not the base model"),
        ("own", "packed", "quantized"),
        ("embedding", "tied", "both"),
    ):
        with pytest.raises(ValueError, match=said):
            rw.export_adapter(tmp_path / "x", tmp_path / adapter, "merged", base=tmp_path / base)
    with pytest.raises(ValueError, match="dtype"):
        rw.export_adapter(
            tmp_path / "x", tmp_path / "own", "merged", base=tmp_path / "base", dtype=torch.float16
        )
    assert not (tmp_path / "x").exists()


# --- the command


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_says_how_to_start_the_server(tmp_path: Path) -> None:
    of_peft(tmp_path / "own", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for to, said in (("vllm", "--max-lora-rank 8"), ("sglang", "--lora-target-modules q_proj v_proj")):
        code, out, err = run(
            "export", tmp_path / "own", "--to", to, "-o", tmp_path / to, "--dtype", "bfloat16"
        )
        assert (code, err) == (0, "") and said in out
        assert {tensor.dtype for tensor in tensors_of(tmp_path / to).values()} == {torch.bfloat16}


def test_the_command_gives_exit_code_2_and_writes_nothing_on_a_users_mistake(tmp_path: Path) -> None:
    of_peft(tmp_path / "own", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    (tmp_path / "full.gguf").write_text("mine")
    for words, said in [
        ((tmp_path / "missing", "--to", "vllm", "-o", tmp_path / "x"), "missing"),
        ((tmp_path / "own", "--to", "gguf", "-o", tmp_path / "full.gguf"), "--overwrite"),
        ((tmp_path / "own", "--to", "merged", "-o", tmp_path / "x", "--base", tmp_path / "no"), "--base"),
        ((tmp_path / "own", "--to", "tgi", "-o", tmp_path / "x"), "tgi"),
        ((tmp_path / "own", "--to", "vllm"), "--output"),
    ]:
        code, out, err = run("export", *words)
        assert code == 2 and said in err and "Traceback" not in err, (words, out, err)
    assert not (tmp_path / "x").exists() and (tmp_path / "full.gguf").read_text() == "mine"


@pytest.mark.parametrize("says", [True, None])
def test_an_embedding_that_the_files_share_is_refused_whatever_the_configuration_says(
    says: bool | None, tmp_path: Path
) -> None:
    """Transformers 5.0 writes no `tie_word_embeddings` for GPT-2. A missing output layer shares the embedding."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(settings).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    data = {k: v for k, v in json.loads(path.read_text()).items() if k != "tie_word_embeddings"}
    path.write_text(json.dumps(data | ({} if says is None else {"tie_word_embeddings": says})))
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    config = rw.LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False)
    rw.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="shares with .lm_head.weight.: merged, it would change both"):
        rw.export_adapter(tmp_path / "out", tmp_path / "adapter", "merged", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
