"""Files and refusals of `rankwise export --to diffusers`. In tests/frameworks, diffusers itself loads the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import rankwise as rw

FILE = "pytorch_lora_weights.safetensors"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.conv = nn.Linear(4, 6), nn.Conv2d(4, 6, 3)
        self.grouped, self.embedding = nn.Conv2d(4, 6, 3, groups=2), nn.Embedding(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x)


def model(*, under: str = "down_blocks", **changes: Any) -> Any:
    torch.manual_seed(0)
    base = nn.ModuleDict({under: nn.ModuleList([Block(), Block()]), "to_q": nn.Linear(4, 6)})
    given = {
        "r": 3,
        "lora_alpha": 12,
        "target_modules": ["0.to_q", "1.to_q", "conv"],
        "init_lora_weights": False,
    }
    return rw.get_peft_model(base, rw.LoraConfig(**{**given, **changes}))


def held(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(folder / FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["lora_adapter_metadata"])


def test_every_name_begins_with_the_component_and_every_scale_is_1(tmp_path: Path) -> None:
    adapted = model(rank_pattern={"1.to_q": 2})
    exported = rw.export_adapter(tmp_path, adapted, "diffusers")
    assert exported.notes == (f"diffusers: pipe.load_lora_weights({str(tmp_path)!r})  # into pipe.unet",)
    tensors, config = held(tmp_path)
    paths = [f"down_blocks.{n}.{layer}" for n in (0, 1) for layer in ("conv", "to_q")]
    assert set(tensors) == {f"unet.{path}.lora_{key}.weight" for path in paths for key in "AB"}
    pattern = {"^down_blocks.1.to_q": 2}
    assert config == {
        "unet.r": 3, "unet.lora_alpha": 3, "unet.rank_pattern": pattern, "unet.alpha_pattern": pattern,
        "unet.target_modules": config["unet.target_modules"],
    }  # fmt: skip
    assert sorted(config["unet.target_modules"]) == paths
    for path in ("down_blocks.0.to_q", "down_blocks.1.to_q"):
        layer = adapted.get_submodule(path)
        A, B = (tensors[f"unet.{path}.lora_{key}.weight"] for key in "AB")
        before = layer.weight.detach().clone()
        x = torch.randn(7, 4)
        with torch.no_grad():
            wanted = layer(x) - nn.functional.linear(x, before, layer.bias)
        torch.testing.assert_close(x @ A.T @ B.T, wanted, rtol=1e-4, atol=1e-5)
    assert tensors["unet.down_blocks.0.conv.lora_A.weight"].shape == (3, 4, 3, 3)
    assert tensors["unet.down_blocks.0.conv.lora_B.weight"].shape == (6, 3, 1, 1)


@pytest.mark.parametrize(
    "under, component",
    [("mid_block", "unet"), ("transformer_blocks", "transformer"), ("text_model", "text_encoder")],
)
def test_the_component_is_recognized_by_its_layers(under: str, component: str, tmp_path: Path) -> None:
    rw.export_adapter(tmp_path, model(under=under), "diffusers", dtype=torch.bfloat16)
    tensors, _ = held(tmp_path)
    assert all(name.startswith(f"{component}.{under}.") for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_component_that_cannot_be_recognized_must_be_given(tmp_path: Path) -> None:
    adapted = model(under="stages")
    with pytest.raises(ValueError, match="layers under stages, which don't show .* `component='unet'`"):
        rw.export_adapter(tmp_path / "out", adapted, "diffusers")
    with pytest.raises(ValueError, match="`component` must be the adapted model's name .* is 'a.b'"):
        rw.export_adapter(tmp_path / "out", adapted, "diffusers", component="a.b")
    assert not (tmp_path / "out").exists()
    rw.export_adapter(tmp_path / "out", adapted, "diffusers", component="prior")
    assert all(name.startswith("prior.stages.") for name in held(tmp_path / "out")[0])
    with pytest.raises(ValueError, match="`component` belongs to 'diffusers'"):
        rw.export_adapter(tmp_path / "other", adapted, "vllm", component="unet")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_modules": ["grouped"], "r": 4}, "the grouped convolution 'down_blocks.0.grouped'"),
        ({"target_modules": ["embedding"]}, "the embedding 'down_blocks.0.embedding'"),
        (
            {"modules_to_save": ["conv"], "target_modules": ["to_q"]},
            "part of a module that was trained in full",
        ),
        ({"bias": "all", "target_modules": ["to_q"]}, "a trained bias"),
    ],
)
def test_layers_that_load_lora_weights_cannot_load_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        rw.export_adapter(tmp_path / "out", model(**changes), "diffusers")
    assert not (tmp_path / "out").exists()


def test_other_files_of_the_folder_stay_and_the_old_one_is_replaced_only_on_request(tmp_path: Path) -> None:
    adapted = model()
    rw.export_adapter(tmp_path, adapted, "diffusers")
    (tmp_path / "README.md").write_text("mine")
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(FileExistsError):
        rw.export_adapter(tmp_path, model(r=2), "diffusers")
    assert (tmp_path / FILE).read_bytes() == before
    rw.export_adapter(tmp_path, model(r=2), "diffusers", overwrite=True)
    assert (tmp_path / FILE).read_bytes() != before
    assert (tmp_path / "README.md").read_text() == "mine"


def test_only_a_pipeline_of_diffusers_is_refused_a_variant(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path, variant=None)  # it is not a model of diffusers
    assert (tmp_path / "adapter_config.json").is_file()
