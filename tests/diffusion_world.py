"""Tiny pipelines of diffusers: Stable Diffusion with a UNet, Stable Diffusion 3 with a diffusion transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def unet_pipeline() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    sizes = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))
    return StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=_tokenizer(), unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def transformer_pipeline() -> Any:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def _tokenizer() -> Any:
    """A CLIP tokenizer of a few words."""
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "a", "c", "t"]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[])


def save_pipelines(folder: Path) -> None:
    """Save the pipelines under the names that the documentation uses."""
    unet_pipeline().save_pretrained(folder / "stable-diffusion-v1-5/stable-diffusion-v1-5")
    transformer_pipeline().save_pretrained(folder / "stabilityai/stable-diffusion-3-medium-diffusers")


def inputs(kind: str, seed: int = 1, size: int = 2) -> dict[str, torch.Tensor]:
    """The inputs of one forward pass of the UNet or of the transformer."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(size, 4, 8, 8, generator=generator)
    prompts = torch.randn(size, 3, 8, generator=generator)
    steps = torch.randint(0, 1000, (size,), generator=generator)
    if kind == "unet":
        return {"sample": latents, "timestep": steps, "encoder_hidden_states": prompts}
    pooled = torch.randn(size, 8, generator=generator)
    return {
        "hidden_states": latents, "timestep": steps, "encoder_hidden_states": prompts, "pooled_projections": pooled,
    }  # fmt: skip
