"""Tiny mixtures of experts with random weights, from Transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 8, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}),
    # transposed and interleaved weights, with biases
    "gpt_oss": (
        "GptOss",
        {"head_dim": 8, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **{"intermediate_size": 24, "moe_intermediate_size": 12, "n_routed_experts": 4, "n_group": 1},
            **{"num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
            **{
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4,
                "v_head_dim": 8,
            },
        },
    ),
    # one batched product over all experts, in its own forward pass
    "llama4": (
        "Llama4Text",
        {
            **{"head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": 4},
            **{"num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
        },
    ),
}

FAMILIES = list(_MODELS)


def tiny_moe(family: str = "mixtral", implementation: str | None = None, **changes: Any) -> Any:
    """A causal language model with four experts in each layer, the same at every call."""
    torch.manual_seed(0)
    name, sizes = _MODELS[family]
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **sizes, **changes})
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    for parameter in model.parameters():
        if not parameter.any():  # Transformers leaves some parameters of random models at 0
            nn.init.normal_(parameter, std=0.05)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model.eval()


def some_tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    """Token ids, the same at every call."""
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(1))
