"""diffusers: adaptive ranks in a UNet and in a diffusion transformer, and exports that its pipelines load.

`make test-frameworks` runs these tests in an environment with diffusers. Elsewhere they are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw

pytest.importorskip("diffusers")

from diffusion_world import inputs, transformer_pipeline, unet_pipeline  # noqa: E402

STEPS = 24
KINDS = {"unet": unet_pipeline, "transformer": transformer_pipeline}
LAYERS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2", "time_emb_proj"],
    "transformer": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "ff.net.2", "proj_out"],
}
kinds = pytest.mark.parametrize("kind", KINDS)


def train(model: Any, kind: str) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        batch = inputs(kind, seed=step)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(**batch).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def output(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(kind, seed=99)).sample


def loaded(kind: str, folder: Path) -> Any:
    """The model of a new pipeline that has loaded ``folder``."""
    pipe = KINDS[kind]()
    pipe.load_lora_weights(str(folder))
    return getattr(pipe, kind)


def own_adapter(kind: str, **changes: Any) -> Any:
    config = rw.AdaLoraConfig(
        **{"init_r": 4, "target_r": 1.5, "total_step": STEPS, "target_modules": LAYERS[kind], **changes}
    )
    model = rw.get_peft_model(getattr(KINDS[kind](), kind), config)
    train(model, kind)
    return model


@kinds
@pytest.mark.parametrize("alpha", [4, 12])
def test_pefts_adapter_trains_to_the_target_and_a_pipeline_loads_its_mixed_ranks(
    kind: str, alpha: int, tmp_path: Path
) -> None:
    import peft

    pipe = KINDS[kind]()
    model = getattr(pipe, kind)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=LAYERS[kind]))
    of_one_rank = sum(value.numel() for value in peft.get_peft_model_state_dict(model).values()) / 4
    ranks = rw.adapt_ranks(model, target_r=1.5, total_step=STEPS)
    train(model, kind)
    assert ranks.is_over
    assert len({layer.rank for layer in ranks.rank_summary().layers}) > 1
    factors = peft.get_peft_model_state_dict(model)
    held = sum(value.numel() for value in factors.values())
    layers = len(ranks.rank_summary().layers)
    most = round(1.5 * layers) / layers  # the budget is a whole number of ranks of average size
    assert 1.4 * of_one_rank < held <= most * of_one_rank

    more = {
        f"{kind}_lora_layers": factors,
        f"{kind}_lora_adapter_metadata": model.peft_config["default"].to_dict(),
    }
    pipe.save_lora_weights(tmp_path, **more)
    wanted = output(model, kind)
    assert not torch.allclose(wanted, output(getattr(KINDS[kind](), kind), kind), atol=1e-2)
    torch.testing.assert_close(output(loaded(kind, tmp_path), kind), wanted, rtol=1e-5, atol=1e-5)


@kinds
@pytest.mark.parametrize("form", ["principal", True])
def test_an_adapter_of_rankwise_is_exported_as_a_pipeline_loads_it(
    kind: str, form: Any, tmp_path: Path
) -> None:
    model = own_adapter(kind, init_lora_weights=form)
    ranks = [layer.rank for layer in model.rank_summary().layers]
    assert len(set(ranks)) > 1
    wanted = output(model, kind)
    exported = rw.export_adapter(tmp_path / "out", model, "diffusers")
    assert f"into pipe.{kind}" in exported.notes[0]
    torch.testing.assert_close(output(loaded(kind, tmp_path / "out"), kind), wanted, rtol=1e-4, atol=1e-5)


@kinds
def test_the_command_exports_a_folder_of_pefts_with_patterns_and_rslora(kind: str, tmp_path: Path) -> None:
    import peft
    from typer.testing import CliRunner

    from rankwise.cli import app

    pattern = {"to_q": 3, "to_out.0": 2}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=LAYERS[kind], rank_pattern=pattern,
        alpha_pattern={"to_v": 9}, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(3)
    model = peft.get_peft_model(getattr(KINDS[kind](), kind), config)
    model.save_pretrained(tmp_path / "adapter")
    words = ["export", str(tmp_path / "adapter"), "--to", "diffusers", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "pipe.load_lora_weights(" in result.output
    wanted = output(model, kind)
    torch.testing.assert_close(output(loaded(kind, tmp_path / "out"), kind), wanted, rtol=1e-4, atol=1e-5)


def test_layers_at_rank_0_and_layers_whose_names_end_alike_are_distinguished(tmp_path: Path) -> None:
    """In SD3, ``proj_out`` is a layer's path, and the end of no other path; in a UNet, some paths end alike."""
    from safetensors import safe_open

    kind = "transformer"
    model = own_adapter(kind, target_modules=["proj_out", "to_q", "to_k", "to_out.0"], target_r=0.5)
    zero = {layer.path for layer in model.rank_summary().layers if not layer.rank}
    assert zero
    wanted = output(model, kind)
    rw.export_adapter(tmp_path, model, "diffusers")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        held = {name.removeprefix("transformer.").partition(".lora_")[0] for name in file.keys()}  # noqa: SIM118
    assert not held & zero
    torch.testing.assert_close(output(loaded(kind, tmp_path), kind), wanted, rtol=1e-4, atol=1e-5)


def test_a_text_encoder_is_exported_if_its_component_is_given(tmp_path: Path) -> None:
    encoder = unet_pipeline().text_encoder
    config = rw.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    torch.manual_seed(3)
    model = rw.get_peft_model(encoder, config)
    ids = torch.tensor([[0, 2, 3, 1]])
    with torch.no_grad():
        wanted = model.eval()(ids).last_hidden_state
    rw.export_adapter(tmp_path, model, "diffusers", component="text_encoder")
    pipe = unet_pipeline()
    pipe.load_lora_weights(str(tmp_path))
    with torch.no_grad():
        found = pipe.text_encoder.eval()(ids).last_hidden_state
        plain = unet_pipeline().text_encoder.eval()(ids).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, wanted, atol=1e-3)


@kinds
def test_saving_a_pipeline_around_an_adapted_model_is_refused_and_works_once_merged(
    kind: str, tmp_path: Path
) -> None:
    pipe = KINDS[kind]()
    config = rw.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(3)
    setattr(pipe, kind, rw.get_peft_model(getattr(pipe, kind), config))
    with pytest.raises(ValueError, match="A pipeline is saved with whole models, but its"):
        pipe.save_pretrained(tmp_path / "pipe")
    getattr(pipe, kind).save_pretrained(tmp_path / "adapter")  # saved by itself, it saves its adapter
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    wanted = output(getattr(pipe, kind), kind)

    setattr(pipe, kind, getattr(pipe, kind).merge_and_unload())
    pipe.save_pretrained(tmp_path / "merged")
    left_out = {name: None for name, part in pipe.components.items() if part is None}
    again = type(pipe).from_pretrained(tmp_path / "merged", **left_out)
    torch.testing.assert_close(output(getattr(again, kind), kind), wanted, rtol=1e-4, atol=1e-5)


def test_pefts_adapter_fused_by_the_pipeline_is_saved_with_it(tmp_path: Path) -> None:
    import peft

    pipe = unet_pipeline()
    pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=LAYERS["unet"]))
    rw.adapt_ranks(pipe.unet, target_r=1.5, total_step=STEPS)
    train(pipe.unet, "unet")
    wanted = output(pipe.unet, "unet")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    torch.testing.assert_close(output(again.unet, "unet"), wanted, rtol=1e-4, atol=1e-5)
