"""A tiny language model with a freshly trained tokenizer, and texts that it can learn."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPPOSITES = {
    "hot": "cold", "big": "small", "old": "young", "light": "dark", "early": "late", "full": "empty", "high": "low",
    "soft": "hard", "wet": "dry", "fast": "slow", "near": "far", "rich": "poor",
}  # fmt: skip
ENDINGS = ("?", "!", " then?", " now?", " here?", " today?")


def questions() -> list[dict[str, str]]:
    """72 questions, each with its answer in its last word."""
    made = [
        {"question": f"what is not {word}{ending}", "answer": f"it is {other}."}
        for ending in ENDINGS
        for word, other in OPPOSITES.items()
    ]
    random.Random(0).shuffle(made)
    return made


def chats() -> list[dict[str, Any]]:
    """Each question as a chat; every third chat has a second turn."""
    made = []
    for i, row in enumerate(questions()):
        turns = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        if i % 3 == 0:
            turns += [{"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes."}]
        made.append({"messages": turns})
    return made


def save_tokenizer(folder: Path, template: str | None = CHAT_TEMPLATE) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{row['question']} {row['answer']}" for row in questions()] + [
        "user assistant system sure? yes."
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<|im_start|>", eos_token="<|im_end|>",
        model_input_names=["input_ids", "attention_mask"], chat_template=template,
    )  # fmt: skip
    wrapped.save_pretrained(str(folder))
    return wrapped


def save_language_model(folder: Path, **changes: Any) -> Path:
    """Save a random Llama of two layers that takes 64 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = save_tokenizer(folder)
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).save_pretrained(str(folder))
    return folder


def save_as_gguf(folder: Path, path: Path) -> Path:
    """Save the model in ``folder`` in llama.cpp's format, in float32."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (auto.from_pretrained(str(folder)) for auto in (AutoModelForCausalLM, AutoTokenizer))
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = sorted(tokenizer.get_vocab().items(), key=lambda word: word[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([3 if number < 3 else 1 for _, number in words])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for part, count in heads.items():
            if part in name:  # llama.cpp's rotary embedding pairs neighbouring rows
                halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, -1)
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.to(torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_language_recipe(folder: Path, model: Path, data: Mapping[str, Any], **changes: Any) -> Path:
    """Write a recipe in ``folder``. ``changes`` replace whole keys; with a double underscore, a section's keys."""
    recipe: dict[str, Any] = {
        "model": str(model),
        "task": "causal-lm",
        "data": {"held_out": 0.25, **data},
        "adapter": {"target_modules": "all-linear", "init_r": 6, "target_r": 4, "lora_alpha": 12},
        "schedule": {"tinit": 0.1, "tfinal": 0.3},
        "training": {"max_steps": 6, "learning_rate": 0.02, "logging_steps": 2},
        "samples": 1,
        "sample_tokens": 6,
        "output": str(folder / "out"),
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            recipe[section][key] = value
        else:
            recipe[section] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
