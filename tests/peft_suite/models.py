"""Makes small random versions of the models that PEFT's tests load from the Hugging Face hub, in the hub's cache.

Usage: HF_HUB_OFFLINE=1 HF_HOME=... python models.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as BytesToText
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as TextToBytes
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
REVISION = "0" * 40
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]

ENDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
WIDTHS = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
DECODER = dict(**WIDTHS, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=256, **ENDS)
ENCODER = dict(**WIDTHS, intermediate_size=37, max_position_embeddings=256)
LLAMA = dict(
    DECODER, hidden_size=16, intermediate_size=32, num_key_value_heads=4, max_position_embeddings=512
)
OPT = dict(vocab_size=VOCABULARY, num_attention_heads=4, max_position_embeddings=256, **ENDS)
GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
)
T5 = dict(
    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=37, num_layers=3, num_decoder_layers=3, num_heads=4,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
)  # fmt: skip
BART = dict(
    vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=4, decoder_ffn_dim=4, max_position_embeddings=100, pad_token_id=1,
    bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip
DEBERTA = dict(ENCODER, pos_att_type=["c2p", "p2c"], relative_attention=True)
ALTERNATING = ["sliding_attention", "full_attention"]


def _llava() -> Any:
    vision = dict(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=30
    )
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, patch_size=15, projection_dim=32),
        text_config=transformers.LlamaConfig(**LLAMA),
        image_token_index=4,
        image_token_id=4,
        image_seq_length=4,
    )


# The class's name; the configuration's class name, or a function that makes the configuration; settings; model names.
Row = tuple[str, str | Callable[[], Any], dict[str, Any], str]
MODELS: list[Row] = [
    ("OPTForCausalLM", "OPTConfig",
     dict(OPT, hidden_size=16, ffn_dim=4, num_hidden_layers=5, word_embed_proj_dim=16),
     "peft-internal-testing/tiny-random-OPTForCausalLM"),
    ("OPTForCausalLM", "OPTConfig",
     dict(OPT, hidden_size=64, ffn_dim=128, num_hidden_layers=12, word_embed_proj_dim=64),
     "peft-internal-testing/opt-125m"),
    ("GPT2LMHeadModel", "GPT2Config", GPT2,
     "peft-internal-testing/tiny-random-gpt2 peft-internal-testing/tiny-random-GPT2LMHeadModel "
     "hf-internal-testing/tiny-random-gpt2 gpt2"),
    ("BertModel", "BertConfig", ENCODER,
     "peft-internal-testing/tiny-random-BertModel hf-internal-testing/tiny-random-BertModel"),
    ("BertForSequenceClassification", "BertConfig", ENCODER,
     "peft-internal-testing/tiny-random-BertForSequenceClassification"),
    ("RobertaModel", "RobertaConfig", dict(ENCODER, type_vocab_size=1, pad_token_id=1),
     "peft-internal-testing/tiny-random-RobertaModel"),
    ("RobertaForSequenceClassification", "RobertaConfig", dict(ENCODER, type_vocab_size=1, pad_token_id=1),
     "peft-internal-testing/tiny-random-RobertaForSequenceClassification"),
    ("DebertaModel", "DebertaConfig", DEBERTA, "peft-internal-testing/tiny-random-DebertaModel"),
    ("DebertaV2Model", "DebertaV2Config", DEBERTA, "peft-internal-testing/tiny-random-DebertaV2Model"),
    ("T5ForConditionalGeneration", "T5Config", T5,
     "peft-internal-testing/tiny-random-t5 peft-internal-testing/tiny-random-T5ForConditionalGeneration "
     "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated google/flan-t5-small"),
    ("BartForConditionalGeneration", "BartConfig", BART,
     "peft-internal-testing/tiny-random-BartForConditionalGeneration"),
    ("LlamaForCausalLM", "LlamaConfig", LLAMA,
     "trl-internal-testing/tiny-random-LlamaForCausalLM peft-internal-testing/tiny-random-LlamaForCausalLM "
     "hf-internal-testing/tiny-random-LlamaForCausalLM"),
    ("LlamaForSequenceClassification", "LlamaConfig", LLAMA,
     "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2"),
    ("MistralForCausalLM", "MistralConfig", dict(DECODER, intermediate_size=37),
     "hf-internal-testing/tiny-random-MistralForCausalLM"),
    ("Gemma3ForCausalLM", "Gemma3TextConfig",
     dict(DECODER, head_dim=8, sliding_window=64, layer_types=ALTERNATING),
     "hf-internal-testing/tiny-random-Gemma3ForCausalLM"),
    ("Gemma4ForCausalLM", "Gemma4TextConfig",
     dict(DECODER, num_hidden_layers=4, num_key_value_heads=1, head_dim=8, global_head_dim=8, sliding_window=64,
          hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=2,
          layer_types=ALTERNATING * 2),
     "peft-internal-testing/tiny-random-gemma4-E2B"),
    ("Qwen2ForCausalLM", "Qwen2Config", dict(DECODER, hidden_size=8, intermediate_size=16),
     "peft-internal-testing/tiny-dummy-qwen2"),
    ("Qwen3ForCausalLM", "Qwen3Config", dict(DECODER, hidden_size=16, intermediate_size=32, head_dim=4),
     "trl-internal-testing/tiny-Qwen3ForCausalLM"),
    ("GPTJForCausalLM", "GPTJConfig", dict(GPT2, n_layer=2, rotary_dim=4),
     "peft-internal-testing/tiny-random-GPTJForCausalLM"),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER, "peft-internal-testing/tiny-random-GPTNeoXForCausalLM"),
    ("BloomForCausalLM", "BloomConfig", dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
     "peft-internal-testing/tiny-random-BloomForCausalLM"),
    ("Llama4ForCausalLM", "Llama4TextConfig",
     dict(DECODER, hidden_size=16, intermediate_size=32, intermediate_size_mlp=32, head_dim=4, num_local_experts=4,
          num_experts_per_tok=1),
     "trl-internal-testing/tiny-Llama4ForCausalLM"),
    ("GptOssForCausalLM", "GptOssConfig",
     dict(DECODER, hidden_size=8, intermediate_size=32, head_dim=4, num_local_experts=4, num_experts_per_tok=2),
     "trl-internal-testing/tiny-GptOssForCausalLM"),
    ("FalconMambaForCausalLM", "FalconMambaConfig",
     dict(vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, **ENDS),
     "tiiuae/falcon-mamba-tiny-dev"),
    ("ResNetForImageClassification", "ResNetConfig",
     dict(embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], num_labels=3),
     "peft-internal-testing/tiny-random-ResNetForImageClassification"),
    ("CLIPTextModelWithProjection", "CLIPTextConfig",
     dict(ENCODER, num_hidden_layers=5, projection_dim=32, bos_token_id=0, eos_token_id=2, pad_token_id=1),
     "peft-internal-testing/tiny-clip-text-2"),
    ("LlavaForConditionalGeneration", _llava, {},
     "peft-internal-testing/tiny-LlavaForConditionalGeneration "
     "hf-internal-testing/tiny-random-LlavaForConditionalGeneration"),
]  # fmt: skip

# Adapters made by PEFT: the class to load the base with, the base, a folder in the repository, the task type, the name.
ADAPTERS = [
    ("AutoModelForCausalLM", "peft-internal-testing/tiny-random-OPTForCausalLM", "", "CAUSAL_LM",
     "peft-internal-testing/tiny-OPTForCausalLM-lora peft-internal-testing/tiny-opt-lora-revision"),
    ("AutoModelForCausalLM", "peft-internal-testing/tiny-random-gpt2", "", "CAUSAL_LM",
     "peft-internal-testing/gpt2-lora-random"),
    ("AutoModel", "peft-internal-testing/tiny-random-BertModel", "", None,
     "peft-internal-testing/tiny-random-BertModel-lora"),
    ("AutoModelForCausalLM", "peft-internal-testing/opt-125m", "test", "CAUSAL_LM",
     "peft-internal-testing/test-lora-subfolder"),
    ("AutoModelForCausalLM", "peft-internal-testing/opt-125m", "", "CAUSAL_LM", "ybelkada/test-st-lora"),
]  # fmt: skip


def snapshot(repository: str) -> Path:
    """The folder of a repository in the hub's cache. It is created if it does not exist."""
    own = Path(os.environ["HF_HOME"], "hub", "models--" + repository.replace("/", "--"))
    (own / "refs").mkdir(parents=True, exist_ok=True)
    for branch in ("main", "test"):
        (own / "refs" / branch).write_text(REVISION)
    folder = own / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer with one entry for each byte."""
    entries = [*SPECIAL, *sorted(TextToBytes.alphabet())]
    tokenizer = Tokenizer(BPE({entry: i for i, entry in enumerate(entries)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = TextToBytes(add_prefix_space=False), BytesToText()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def main() -> None:
    """Make all models, then adapters for some of them."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    for cls, config, settings, names in MODELS:
        made = config() if callable(config) else getattr(transformers, config)(**settings)
        model = getattr(transformers, cls)(made)
        for name in names.split():
            model.save_pretrained(snapshot(name))
            if "ResNet" in cls:
                size = {"shortest_edge": 64}
                transformers.ConvNextImageProcessor(size=size, crop_pct=1.0).save_pretrained(snapshot(name))
            else:
                save_tokenizer(snapshot(name))
    for auto, base, subfolder, task, names in ADAPTERS:
        for name in names.split():
            model = getattr(transformers, auto).from_pretrained(base)
            config = peft.LoraConfig(init_lora_weights=False, task_type=task)
            peft.get_peft_model(model, config).save_pretrained(snapshot(name) / subfolder)
            save_tokenizer(snapshot(name))


if __name__ == "__main__":
    main()
