"""Saving and loading adapters; a broken adapter leaves the model unchanged."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import rankwise as rw
from block_world import X, adalora, assert_same, block, lora, snapshot, train, two_adapters
from rankwise import storage


def test_adapters_load_next_to_others(tmp_path: Path) -> None:
    model, outputs = two_adapters()
    model.save_pretrained(tmp_path)
    fresh = rw.PeftModel.from_pretrained(block(), tmp_path)
    fresh.load_adapter(tmp_path / "other", "second")
    assert fresh.active_adapters == ["default"] and torch.equal(fresh(X), outputs["default"])
    assert not any(p.requires_grad for p in fresh.parameters())
    fresh.set_adapter("second")
    assert torch.equal(fresh(X), outputs["other"])
    assert not any(p.requires_grad for p in fresh.parameters()), "it was loaded for inference"
    fresh.load_adapter(tmp_path / "other", "trained", is_trainable=True)
    fresh.set_adapter("trained")
    assert any(p.requires_grad for p in fresh.parameters())
    assert rw.PeftModel.from_pretrained(fresh, tmp_path, "third") is fresh
    assert fresh.active_adapters == ["third"] and torch.equal(fresh(X), outputs["default"])


def test_saving_into_a_folder_keeps_other_files(tmp_path: Path) -> None:
    model, _ = two_adapters()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine, too")
    (tmp_path / "elsewhere").mkdir()
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert (tmp_path / "other" / "notes.txt").read_text() == "mine, too"
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    files = {"adapter_config.json", "adapter_model.safetensors"}
    assert found == {
        "notes.txt",
        "other",
        "elsewhere",
        "other/notes.txt",
        *files,
        *(f"other/{name}" for name in files),
    }


def test_selected_adapters_are_saved(tmp_path: Path) -> None:
    model, _ = two_adapters()
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    with pytest.raises(ValueError, match="no adapter 'third'"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["other", "third"])
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_a_lora_adapter_saved_over_an_adalora_one_leaves_nothing_of_it(tmp_path: Path) -> None:
    model = rw.get_peft_model(block(), adalora())
    train(model, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"rank_history.json", "training_state.safetensors"}
    other, outputs = two_adapters()
    other.save_pretrained(tmp_path, selected_adapters=["default"])
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(rw.PeftModel.from_pretrained(block(), tmp_path)(X), outputs["default"])


def _broken_folder(tmp_path: Path, kind: str) -> Path:
    from safetensors.torch import load_file, save_file

    config = {"adalora": adalora(), "state": adalora()}.get(kind, lora())
    model = rw.get_peft_model(block(), config)
    if kind == "state":
        train(model, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    path = tmp_path / ("training_state.safetensors" if kind == "state" else "adapter_model.safetensors")
    tensors = load_file(path)
    if kind == "missing":
        tensors.pop(next(iter(tensors)))
    elif kind == "shape":
        tensors = {key: value.repeat(1, 2) if "lora_A" in key else value for key, value in tensors.items()}
    elif kind == "foreign":
        tensors = {key.replace("first", "third"): value for key, value in tensors.items()}
    elif kind == "extra":
        tensors["base_model.model.nowhere.weight"] = torch.zeros(2)
    elif kind == "state":
        tensors.pop("rankwise_mask")
    else:
        tensors = {key: value[:1] for key, value in tensors.items()}
    save_file(tensors, path)
    return tmp_path


@pytest.mark.parametrize("kind", ["missing", "shape", "foreign", "extra", "adalora", "state"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_broken_adapter_leaves_the_model_as_it_was(tmp_path: Path, kind: str, adapted: bool) -> None:
    folder = _broken_folder(tmp_path, kind)
    model = block().train()
    model.head.weight.requires_grad_(False)
    if adapted:
        rw.get_peft_model(model, lora())
        model.body.first.weight.requires_grad_(True)
    expected, before = model(X), snapshot(model)
    with pytest.raises(ValueError):
        rw.PeftModel.from_pretrained(model, folder, "new", is_trainable=True)
    assert_same(before, snapshot(model))
    assert torch.equal(model(X), expected)


def test_a_checkpoint_of_another_adapter_changes_nothing(tmp_path: Path) -> None:
    rw.get_peft_model(block(), lora(target_modules=["first"])).save_pretrained(tmp_path)
    model, outputs = two_adapters()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"body\.second"):
        model.load_checkpoint(tmp_path)
    assert_same(before, snapshot(model))
    assert storage.read_adapter(tmp_path).factors.keys() == {"body.first"}
