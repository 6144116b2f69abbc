"""Folders of the default form with E, from earlier versions: they load, resume and are inspected as plain LoRA."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankwise as rw
from rankwise.report.inspect import inspect_adapter
from rankwise.report.spectra import update_spectra

FOLDER = Path(__file__).parent / "earlier"
sys.path.insert(0, str(FOLDER))

from make import INPUTS, STEPS, STOP, Small, optimizer_for, train  # noqa: E402

EXPECTED = load_file(FOLDER / "expected.safetensors")
RANKS = json.loads((FOLDER / "ranks.json").read_text())
CHECKPOINT = f"checkpoint-{STOP}"


def base() -> Any:
    model = Small()
    model.load_state_dict({name[5:]: value for name, value in EXPECTED.items() if name.startswith("base.")})
    return model


def output(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(INPUTS)
    return found


def optimizer_state() -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in EXPECTED.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = value.clone()
    return state


def same(model: Any, expected: Tensor) -> None:
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_finished_folder_computes_the_same_and_is_plain_lora(trainable: bool, tmp_path: Path) -> None:
    model = rw.PeftModel.from_pretrained(base(), FOLDER / "finished", is_trainable=trainable)
    same(model, EXPECTED["finished"])
    assert type(model.peft_config["default"]) is rw.LoraConfig
    assert not any("lora_E" in name for name, _ in model.named_parameters())
    assert {row.path: (row.rank, row.init_r) for row in model.rank_summary().layers} == {
        path: (rank, 4) for path, rank in RANKS.items()
    }
    model.save_pretrained(tmp_path)
    same(rw.PeftModel.from_pretrained(base(), tmp_path), EXPECTED["finished"])
    same(model.merge_and_unload(), EXPECTED["finished"])
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    same(theirs, EXPECTED["finished"])


def test_an_unfinished_run_goes_on_with_its_ranks_and_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    # The expected ranks are those that the earlier version ended with, whose score had another power of the cost.
    monkeypatch.setattr("rankwise.method.worth._POWER_OF_COSTS", 1)
    model = rw.PeftModel.from_pretrained(base(), FOLDER / CHECKPOINT, is_trainable=True)
    same(model, EXPECTED["checkpoint"])
    config, controller = model.peft_config["default"], model._rankwise_controller
    assert (config.init_r, config.target_r, config.total_step) == (4, 1, STEPS)
    assert model.allocation_state.step == STOP
    at_stop = model.rank_history.records[-1]
    earlier = json.loads((FOLDER / CHECKPOINT / "rank_history.json").read_text())
    assert at_stop.ranks == earlier["records"][-1]["ranks"] and at_stop.step == earlier["records"][-1]["step"]
    gates = load_file(FOLDER / CHECKPOINT / "training_state.safetensors")
    for pair in controller.factors.pairs:
        E = gates[f"{pair.path}.lora_E"].flatten()
        if E.any():
            assert pair.scale == pytest.approx(3 / (4 + 1e-5) * float(E.max()))
        assert not pair.parameter("A")[E == 0].any() and not pair.parameter("B")[:, E == 0].any()
    optimizer = optimizer_for(model.train())
    optimizer.load_state_dict({**optimizer.state_dict(), "state": optimizer_state()})
    train(model, optimizer, STEPS - STOP)
    assert model.allocation_state.reached_target
    assert {row.path: row.rank for row in model.rank_summary().layers} == RANKS
    # The optimizer's state was restored, too. Only the last scale differs, by a few percent.
    torch.testing.assert_close(output(model), EXPECTED["finished"], rtol=0, atol=0.1)


def test_an_attached_adapter_takes_a_checkpoint_with_and_without_its_state(tmp_path: Path) -> None:
    config = rw.AdaLoraConfig(
        init_r=4, target_r=1, lora_alpha=3, tinit=2, tfinal=4, deltaT=2, total_step=STEPS,
        target_modules=["conv", "first", "idle", "last"], target_parameters=["experts.up"],
    )  # fmt: skip
    model = rw.get_peft_model(base(), config)
    model.load_checkpoint(FOLDER / CHECKPOINT)
    same(model, EXPECTED["checkpoint"])
    with pytest.warns(UserWarning, match="holds no training_state"):
        model.load_checkpoint(FOLDER / "finished")
    same(model, EXPECTED["finished"])
    assert {row.path: row.rank for row in model.rank_summary().layers} == RANKS


def gated(folder: Path, differing: bool) -> Path:
    """The finished folder as a still earlier version wrote it: its gates may differ within a layer."""
    shutil.copytree(FOLDER / "finished", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "gated"}))
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, value in tensors.items():
        if name.endswith("lora_E") and differing:
            tensors[name] = value * torch.rand(value.shape, generator=generator)
        elif name.endswith("lora_B"):
            tensors[name] = torch.randn(value.shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def by_hand(folder: Path) -> Tensor:
    """The adapted model's outputs, with each weight changed by ``scale * B diag(E) A`` in float64."""
    model, tensors = base(), load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    for path in ("conv", "first", "idle", "last"):
        A, E, B = (tensors[f"base_model.model.{path}.lora_{key}"].double() for key in "AEB")
        weight = model.get_submodule(path).weight.data
        weight += (3 / (4 + 1e-5) * B @ (E * A)).view(weight.shape).float()
    A, E, B = (tensors[f"base_model.model.experts.up.lora_{key}"].double() for key in "AEB")
    kept = torch.tensor(config["rank_pattern"]["experts.up.lora_E"]).view(3, 4).sum(1).tolist()
    for number, (a, e, b) in enumerate(zip(A.split(kept), E.split(kept), B.split(kept, 1), strict=True)):
        model.experts.up.data[number] += (3 / (4 + 1e-5) * b @ (e * a)).float()
    return output(model)


@pytest.mark.parametrize("differing", [False, True])
def test_gates_that_differ_are_multiplied_into_B(differing: bool, tmp_path: Path) -> None:
    folder = gated(tmp_path / "gated", differing)
    expected = by_hand(folder)
    assert not torch.allclose(expected, EXPECTED["finished"], atol=0.01)
    same(rw.PeftModel.from_pretrained(base(), folder), expected)
    lora = rw.get_peft_model(base(), rw.LoraConfig(r=4, target_modules=["last"]))
    rw.PeftModel.from_pretrained(lora, folder, adapter_name="more")
    lora.set_adapter("more")
    same(lora, expected)


def test_an_adapter_without_any_rank_left_is_its_base_model(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    shutil.copytree(FOLDER / "finished", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in tensors:
        if name.endswith("lora_E"):
            tensors[name].zero_()
    save_file(tensors, folder / "adapter_model.safetensors")
    same(rw.PeftModel.from_pretrained(base(), folder), output(base()))


def test_older_folders_are_inspected_without_a_model() -> None:
    report = inspect_adapter(FOLDER / "finished")
    assert {layer.path: (layer.rank, layer.init_r) for layer in report.layers} == {
        path: (rank, 4) for path, rank in RANKS.items()
    }
    assert report.method == "AdaLoRA" and report.peft_type == "ADALORA"
    spectra = update_spectra(FOLDER / "finished")
    assert {path: len(values) for path, values in spectra.items() if values} == {
        path: rank for path, rank in RANKS.items() if rank
    }


def test_a_state_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(FOLDER / "finished", folder)
    shutil.copy(FOLDER / CHECKPOINT / "training_state.safetensors", folder)
    with pytest.raises(ValueError, match="were not saved together"):
        rw.PeftModel.from_pretrained(base(), folder, is_trainable=True)
