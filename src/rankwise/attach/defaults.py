"""The default targets of each architecture, and the heads that each task type trains in full."""

from __future__ import annotations

from collections.abc import Mapping

# Heads that a task type implies. They train in full. DistilBERT's pre_classifier is as new as its classifier.
HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("pre_classifier", "classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _table(*rows: tuple[str, str]) -> dict[str, list[str] | str]:
    return {kind: names.split() for names, kinds in rows for kind in kinds.split()}


# Default targets by `model.config.model_type`. PEFT's defaults are used where it has any. Names that a model lacks are
# ignored, so one row can hold the names of several Transformers versions.
DEFAULTS: dict[str, list[str] | str] = {
    **_table(
        (
            "q_proj v_proj",
            "arcee bart bigbird_pegasus biogpt blenderbot blenderbot-small chameleon clip clip_text_model "
            "clip_vision_model cohere cohere2 data2vec-audio dinov3_vit ernie4_5 eurobert exaone4 gemma "
            "gemma2 gemma3_text glm glm4 gpt_neo gpt_oss gptj granite helium hubert hunyuan_v1_dense jamba "
            "lfm2 llama llama4 llama4_text m2m_100 marian mbart ministral mistral mixtral moonshine nemotron "
            "nllb-moe nomic_bert olmo olmo2 olmo3 opt pegasus plbart qwen2 qwen2_moe qwen3 qwen3_moe "
            "qwen3_next seed_oss siglip siglip2 siglip_text_model siglip_vision_model smollm3 speech_to_text "
            "speecht5 stablelm starcoder2 trocr unispeech unispeech-sat wav2vec2 whisper xglm",
        ),
        (
            "query value",
            "albert bert bert-generation big_bird camembert convbert data2vec-text electra ernie esm "
            "layoutlm layoutlmv3 luke megatron-bert mobilebert nystromformer rembert roberta "
            "roberta-prelayernorm roc_bert roformer splinter tapas videomae xlm-roberta xlm-roberta-xl xmod "
            "yolos",
        ),
        (
            "query value q_proj v_proj",
            "audio-spectrogram-transformer beit deit dinov2 dinov2_with_registers ijepa led swin swinv2 vit "
            "vit_mae vit_msn vivit",
        ),
        ("query value query_global value_global", "longformer"),
        (
            "query_key_value",
            "bloom chatglm falcon gpt_neox gpt_neox_japanese persimmon RefinedWeb RefinedWebModel",
        ),
        ("q v", "longt5 mpnet mt5 switch_transformers t5 umt5"),
        ("q v q_proj v_proj", "blip-2"),
        ("Wqkv", "modernbert modernbert-decoder mpt"),
        ("c_attn", "gpt2 gpt_bigcode imagegpt"),
        ("c_proj c_attn", "btlm"),
        ("qkv_proj", "codegen phi3"),
        ("q_proj v_proj fc1 fc2", "phi"),
        ("q_proj k_proj v_proj o_proj", "nemotron_h"),
        ("q_lin v_lin", "distilbert flaubert xlm"),
        ("query_proj value_proj", "deberta-v2"),
        ("in_proj", "deberta"),
        ("q_head v_head", "funnel"),
        ("linear_q linear_v", "wav2vec2-bert wav2vec2-conformer"),
        ("intermediate_dense output_dense", "wavlm"),  # its attention reads weights and calls no layer
        ("key value receptance output", "rwkv"),
        ("r_proj k_proj v_proj o_proj key value", "rwkv7"),
    ),
    "gemma3": r".*language_model\..*\.(q_proj|v_proj)",
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}

# PEFT's AdaLoRA has other defaults for these architectures.
ADALORA_DEFAULTS = {
    **DEFAULTS,
    **_table(
        ("q k v o wi wo", "t5"),
        ("q k v o wi_0 wi_1 wo", "mt5"),
        ("q_proj k_proj v_proj out_proj fc1 fc2", "bart opt"),
        ("query key value dense", "roberta"),
        ("query_proj key_proj value_proj dense", "deberta-v2"),
    ),
}
