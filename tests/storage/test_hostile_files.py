"""Broken, swapped, mislabelled and malicious adapter folders are refused, and never leave a model half changed."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.files.tensors import write_tensor_file

CONFIG, WEIGHTS, STATE = "adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"
HISTORY, PICKLE, RUN = "rank_history.json", "adapter_model.bin", "training_config.json"
PREFIX = "base_model.model."
IDS = torch.arange(12).reshape(3, 4) % 11


class Small(nn.Module):
    """An embedding, linear layers, a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.conv = nn.Conv2d(2, 4, 2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Linear(36, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids).mean(1)).tanh()
        x = self.norm(self.conv(x.view(-1, 2, 2, 2))).relu()
        return self.head(self.second(x.flatten(1)).tanh())


def base() -> Any:
    torch.manual_seed(0)
    return Small()


def config_of(kind: str) -> Any:
    if kind.startswith(("adalora", "default")):
        start = True if kind.startswith("adalora") else "principal"
        return rw.AdaLoraConfig(init_lora_weights=start,
                                init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=2, total_step=14, lora_alpha=8,
                                target_modules=["first", "conv", "second"], modules_to_save=["head"],
                                bias="lora_only")  # fmt: skip
    return rw.LoraConfig(r=2, lora_alpha=4, target_modules=["embed", "first", "conv", "second"],
                         modules_to_save=["head"], rank_pattern={"first": 3}, alpha_pattern={"second": 5})  # fmt: skip


def train(model: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        (model(IDS) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# AdaLoRA in the paper's form, whose folders are in PEFT's AdaLoRA format; and in the default form, saved as plain LoRA.
KINDS = {
    "adalora": 14,
    "adalora in training": 9,
    "default": 14,
    "default in training": 9,
    "lora": 3,
    "lora as a pickle": 3,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good adapter folders of all kinds."""
    made = {}
    for kind, steps in KINDS.items():
        torch.manual_seed(len(kind))
        folder = made[kind] = tmp_path_factory.mktemp("good") / "adapter"
        model = rw.get_peft_model(base(), config_of(kind))
        train(model, steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
        if kind == "lora as a pickle":
            torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
            (folder / WEIGHTS).unlink()
    return made


# Three ways by which a folder gets into a model.


def into_base(folder: Path) -> Any:
    return rw.PeftModel.from_pretrained(base(), folder)


class Door:
    """A way to load a folder, and the model that it is loaded into."""

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        if name == "attached":
            torch.manual_seed(5)
            self.model = rw.get_peft_model(base(), config_of(kind))
        else:
            self.model = base()
            self.model.norm.eval()
            self.model.head.requires_grad_(False)
        if name == "second":
            rw.get_peft_model(self.model, rw.LoraConfig(r=1, target_modules=["first", "second"]), "one")

    def load(self, folder: Path) -> Any:
        if self.name == "attached":
            self.model.load_checkpoint(folder)
        elif self.name == "second":
            self.model.load_adapter(folder, "two", is_trainable=True)
            self.model.set_adapter("two")
        else:
            rw.PeftModel.from_pretrained(self.model, folder, is_trainable=self.name == "trainable")
        return self.model


DOORS = ("inference", "trainable", "attached", "second")


class Snapshot:
    """Everything in a model that a failed load must not change."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen = self.look(model)

    @staticmethod
    def look(model: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {"attributes": sorted(vars(model)), "random": torch.get_rng_state()}
        for path, module in model.named_modules():
            seen[f"class of {path}"] = type(module)
            seen[f"mode of {path}"] = module.training
            for name in ("active_adapters", "active_adapter", "merged_adapters", "adapters_enabled", "kept"):
                if name in vars(module):
                    seen[f"{name} of {path}"] = copy.deepcopy(vars(module)[name])
        seen |= {f"requires_grad of {name}": p.requires_grad for name, p in model.named_parameters()}
        seen |= {f"value of {name}": value.clone() for name, value in model.state_dict().items()}
        if isinstance(model, rw.PeftModel):
            seen |= {"configs": dict(model.peft_config), "state": model.allocation_state}
            seen["history"] = model.rank_history and list(model.rank_history.records)
        clone = copy.deepcopy(model).eval()
        with torch.no_grad():
            seen["output"] = clone(IDS)
        return seen

    def assert_unchanged(self) -> None:
        now = self.look(self.model)
        assert now.keys() == self.seen.keys()
        for key, before in self.seen.items():
            same = (
                torch.equal(before, now[key]) if isinstance(before, Tensor) else str(before) == str(now[key])
            )
            assert same, f"{key} has changed from {before} to {now[key]}"


def assert_refused(folder: Path, door: Door, message: str | None = None) -> str:
    """Check that the folder is refused clearly, and that the model is unchanged."""
    snapshot = Snapshot(door.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as refused:
            door.load(folder)
    snapshot.assert_unchanged()
    check_message(refused.value, folder)
    return str(refused.value)


def check_message(error: BaseException, folder: Path) -> None:
    text = str(error)
    assert type(error) in (ValueError, TypeError, FileNotFoundError), repr(error)
    assert str(folder) in text, f"the message names no file: {text}"
    assert len(text) < 1500, text


def assert_works(model: Any, trains: bool) -> None:
    """Check that a loaded model computes, trains, saves, and loads again."""
    clone = copy.deepcopy(model).eval()
    with torch.no_grad():
        output = clone(IDS)
    assert output.shape == (3, 3) and output.isfinite().all()
    if trains:
        train(copy.deepcopy(model).train(), 1)
    with tempfile.TemporaryDirectory() as folder:
        name = clone.active_adapter
        clone.save_pretrained(folder, selected_adapters=[name])
        place = Path(folder) / ("" if name == "default" else name)
        again = rw.PeftModel.from_pretrained(base(), place).eval()
        own = {key: value for key, value in clone.state_dict().items() if ".lora_" not in key}
        again.load_state_dict(own, strict=False)  # tensors of the model itself may differ
        with torch.no_grad():
            assert torch.allclose(again(IDS), output, atol=1e-5)


# Kinds of damage; each is done to a copy of a good folder.


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / CONFIG).read_text())
        data.update(changes)
        (folder / CONFIG).write_text(json.dumps(data))

    return damage


def pattern(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / CONFIG).read_text())
        change(data["rank_pattern"])
        (folder / CONFIG).write_text(json.dumps(data))

    return damage


def content(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], object], name: str = WEIGHTS) -> Callable[[Path], None]:
    """Change tensors, as a program that rewrites the whole file."""

    def damage(folder: Path) -> None:
        held = {key: value.clone() for key, value in load_file(folder / name).items()}
        change(held)
        write_tensor_file(folder / name, {key: value.contiguous() for key, value in held.items()})

    return damage


def run(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the run's configuration."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / RUN).read_text())
        change(data)
        (folder / RUN).write_text(json.dumps(data))

    return damage


def with_layer(history: bytes, rank: int) -> bytes:
    """A history that names one more layer."""
    data = json.loads(history)
    data["layers"].append("third")
    for record in data["records"]:
        record["ranks"].append(rank)
    return json.dumps(data).encode()


def put(key: str, value: Callable[[Tensor], Tensor], name: str = WEIGHTS) -> Callable[[Path], None]:
    return tensors(lambda held: held.update({key: value(held[key])}), name)


def header(change: Callable[[dict[str, Any]], object], name: str = WEIGHTS) -> Callable[[Path], None]:
    """Change only the header of a safetensors file."""

    def edit(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return content(name, edit)


def flip(data: bytes, place: int, bit: int = 3) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


def replaced_by(make: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


A, B, E = (f"{PREFIX}first.lora_{factor}" for factor in "ABE")
LORA_A = f"{A}.weight"

DAMAGE: dict[str, list[tuple[str, Callable[[Path], None], str]]] = {
    "adalora": [
        ("config missing", lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
        ("weights missing", lambda f: (f / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
        ("config empty", content(CONFIG, lambda _: b""), "not valid JSON"),
        ("config cut off", content(CONFIG, lambda data: data[:-40]), "not valid JSON"),
        ("config not UTF-8", content(CONFIG, lambda data: data.replace(b"first", b"f\xffrst")), "utf-8"),
        ("config UTF-16", content(CONFIG, lambda data: data.decode().encode("utf-16")), "utf-8"),
        ("config with NUL bytes", content(CONFIG, lambda data: b"\0" * len(data)), "not valid JSON"),
        ("config nested without end", replaced_by(deep, CONFIG), "not valid JSON"),
        ("config a list", content(CONFIG, lambda _: b"[1]"), "must hold a JSON object"),
        ("config with a field twice", content(CONFIG, lambda d: d.replace(b"{", b'{"init_r": 3,', 1)), "twice"),
        ("config with NaN", config(lora_alpha=float("nan")), "NaN"),
        ("config of another kind of adapter", config(peft_type="IA3"), "IA3"),
        ("config without a kind", config(peft_type=None), "peft_type"),
        ("labelled LORA", config(peft_type="LORA", rank_pattern={}), "has lora_E tensors; LORA takes lora_A, lora_B"),
        ("r in words", config(init_r="four"), "whole number"),
        ("r a fraction", config(init_r=4.5), "whole number"),
        ("r negative", config(init_r=-4), "at least 1"),
        ("r zero", config(init_r=0), "at least 1"),
        ("r absurd", config(init_r=10**9), "rank_pattern"),
        ("r absurd and no pattern", config(init_r=10**9, rank_pattern=None), "should have 1000000000 triplets"),
        ("r beyond all bounds", config(init_r=10**40, rank_pattern=None), "absurdly large"),
        ("r true", config(init_r=True), "whole number"),
        ("alpha text", config(lora_alpha="8"), "must be a number"),
        ("alpha absurd", config(lora_alpha=1e300), "absurdly large"),
        ("alpha infinite", content(CONFIG, lambda d: d.replace(b'"lora_alpha": 8', b'"lora_alpha": 1e999')), "finite"),
        ("dropout 7", config(lora_dropout=7), "lora_dropout"),
        ("targets a number", config(target_modules=3), "target_modules"),
        ("heads a text", config(modules_to_save="head"), "modules_to_save"),
        ("an unknown field that matters", config(use_dora=True), "use_dora"),
        ("pattern a list", config(rank_pattern=[True]), "must be a dictionary"),
        ("pattern of numbers", pattern(lambda p: p.update({"first.lora_E": [1, 1, 0, 0]})), "list of booleans"),
        ("pattern too short", pattern(lambda p: p.update({"first.lora_E": [True]})), "must have init_r=4 booleans"),
        ("pattern keeps more", pattern(lambda p: p.update({"second.lora_E": [True] * 4})), "should have 4 triplets"),
        ("pattern keeps none", pattern(lambda p: p.update({"second.lora_E": [False] * 4})), "should have 0 triplets"),
        ("pattern of another layer", pattern(lambda p: p.update({"third.lora_E": [True] * 4})), "third"),
        ("pattern with an odd key", pattern(lambda p: p.update({"first": [True] * 4})), "keys such as"),
        ("head missing", tensors(lambda t: [t.pop(k) for k in list(t) if "head" in k]), "no tensors of 'head'"),
        ("head half there", tensors(lambda t: t.pop(f"{PREFIX}head.bias")), "head.bias"),
        ("head of another shape", put(f"{PREFIX}head.weight", lambda t: t[:2]), r"head.weight is \(2, 8\)"),
        ("head of whole numbers", put(f"{PREFIX}head.weight", lambda t: t.int()), "int32"),
        ("head with NaN", put(f"{PREFIX}head.weight", spoil(torch.nan)), "head.weight holds NaN"),
        ("bias with NaN", put(f"{PREFIX}first.base_layer.bias", spoil(torch.nan)), "first.bias holds NaN"),
        ("weights empty", content(WEIGHTS, lambda _: b""), "can't be read as safetensors"),
        ("weights cut off", content(WEIGHTS, lambda data: data[:-1]), "can't be read as safetensors"),
        ("weights cut in the header", content(WEIGHTS, lambda data: data[:100]), "can't be read as safetensors"),
        ("weights with something after", content(WEIGHTS, lambda data: data + b"more"), "can't be read"),
        ("weights are text", content(WEIGHTS, lambda _: b"<html>404</html>" * 9), "can't be read as safetensors"),
        ("a bit of a value flipped", content(WEIGHTS, lambda d: flip(d, len(d) - 7)), "damaged"),
        ("a bit of a name flipped", content(WEIGHTS, lambda d: flip(d, d.index(b"first.lora_A"), 0)), "damaged"),
        ("a header without end", content(WEIGHTS, lambda d: b"\xff" * 8 + d[8:]), "can't be read as safetensors"),
        ("a header of 2 GB", content(WEIGHTS, lambda d: struct.pack("<Q", 2**31) + d[8:]), "can't be read"),
        ("a tensor longer than the file", header(lambda t: t[A].update(shape=[2**40, 8])), "can't be read"),
        ("shapes that overflow", header(lambda t: t[A].update(shape=[2**62, 2**62])), "can't be read"),
        ("tensors over each other", header(lambda t: t[A].update(data_offsets=t[B]["data_offsets"])), "can't be read"),
        ("no tensors", tensors(lambda t: t.clear()), "no adapter tensors"),
        ("no factors", tensors(lambda t: [t.pop(k) for k in list(t) if "lora" in k]), "names|says ADALORA"),
        ("E missing", tensors(lambda t: t.pop(E)), "incomplete or mislabelled"),
        ("a layer missing", tensors(lambda t: [t.pop(each) for each in (A, B, E)]), "of which .* has no tensors"),
        ("a factor twice", tensors(lambda t: t.update({f"{A}.weight": t[A] + 1})), "twice"),
        ("A and B swapped", tensors(lambda t: t.update({A: t[B], B: t[A]})), "should have"),
        ("A turned", put(A, lambda t: t.T), "should have"),
        ("A flat", put(A, lambda t: t.flatten()), "should be a matrix"),
        ("A a single number", put(A, lambda t: t[0, 0]), "should be a matrix"),
        ("A of whole numbers", put(A, lambda t: t.int()), "not floating point"),
        ("A complex", put(A, lambda t: t.to(torch.complex64)), "not floating point"),
        ("A with NaN", put(A, spoil(torch.nan)), "lora_A of 'first' holds NaN"),
        ("B with an infinity", put(B, spoil(-torch.inf)), "lora_B of 'first' holds NaN or inf"),
        ("E of doubles too large", put(E, lambda t: t.double() * 1e300), "lora_E holds NaN or inf"),
        ("A too wide", put(A, lambda t: torch.cat([t, t], 1)), "this model takes"),
        ("a layer that does not exist", tensors(lambda t: t.update({k.replace("first", "third"): t.pop(k)
                                                                      for k in (A, B, E)})), "third|first"),
        ("a layer that can't be adapted", tensors(lambda t: t.update({f"{PREFIX}norm.lora_{f}": torch.ones(4, 4)
                                                                        for f in "ABE"})), "norm"),
        ("a weight of the base", tensors(lambda t: t.update({f"{PREFIX}first.weight": torch.ones(8, 8)})),
         "would replace 'first.weight'"),
        ("a tensor of nothing", tensors(lambda t: t.update({"evil": torch.ones(3)})), "no 'evil'"),
        ("a layer inside the head", tensors(lambda t: t.update({f"{PREFIX}head.lora_A": torch.ones(4, 8),
                                                                  f"{PREFIX}head.lora_B": torch.ones(3, 4),
                                                                  f"{PREFIX}head.lora_E": torch.ones(4, 1)})),
         "other layers|also holds all of 'head'"),
        ("history not JSON", content(HISTORY, lambda data: data[:-9]), "rank_history.json is not a rank history"),
        ("history of other layers", content(HISTORY, lambda d: d.replace(b"second", b"third")), "other layers"),
        ("history with absurd numbers", content(HISTORY, lambda d: d.replace(b'"step": 0', b'"step": 9' + b"0" * 40)),
         "whole number"),
        ("history a list", content(HISTORY, lambda _: b"[]"), "not a rank history"),
        ("config a folder", replaced_by(Path.mkdir, CONFIG), "no adapter_config.json"),
        ("weights a folder", replaced_by(Path.mkdir, WEIGHTS), "should be a file"),
        ("history a folder", replaced_by(Path.mkdir, HISTORY), "should be a file"),
        ("weights a link to nowhere", replaced_by(lambda p: p.symlink_to("nowhere"), WEIGHTS), "should be a file"),
        ("config a link to itself", replaced_by(lambda p: p.symlink_to(CONFIG), CONFIG), "no adapter_config.json"),
        ("weights a link to a device", replaced_by(lambda p: p.symlink_to("/dev/zero"), WEIGHTS), "should be a file"),
        ("weights a pipe", replaced_by(os.mkfifo, WEIGHTS), "should be a file"),
    ],
    "lora": [
        ("labelled ADALORA", config(peft_type="ADALORA", rank_pattern=None, alpha_pattern={}), "ADALORA takes"),
        ("pattern of booleans", config(rank_pattern={"first": [True]}), "whole number"),
        ("pattern of another rank", config(rank_pattern={"first": 2}), "has rank 3, but adapter_config.json gives it rank 2"),  # noqa: E501
        ("pattern no expression", config(rank_pattern={"(": 2}), "not a regular expression"),
        ("r absurd", config(r=10**9), "has rank 2, but adapter_config.json gives it rank 1000000000"),
        ("r other", config(r=1), "has rank 2"),
        ("base weights changed by its start", config(init_lora_weights="pissa"), "pissa"),
        ("weights cut off", content(WEIGHTS, lambda data: data[:-1]), "can't be read as safetensors"),
        ("A with NaN", put(LORA_A, spoil(torch.nan)), "holds NaN"),
        ("A of four dimensions", put(f"{PREFIX}conv.lora_A.weight", lambda t: t.flatten()), "should be a matrix"),
        ("kernel of another shape", put(f"{PREFIX}conv.lora_A.weight", lambda t: t[..., :1]), "this model takes"),
        ("B of a group too much", put(f"{PREFIX}conv.lora_B.weight", lambda t: torch.cat([t, t], 1)), "takes"),
        ("a layer missing", tensors(lambda t: [t.pop(k) for k in list(t) if "first" in k and "lora" in k]),
         "first|rank_pattern"),
    ],
    "adalora in training": [
        ("state empty", content(STATE, lambda _: b""), "training_state.safetensors is broken or cut off"),
        ("state cut off", content(STATE, lambda data: data[: len(data) // 2]), "can't be read as safetensors"),
        ("a bit flipped", content(STATE, lambda d: flip(d, len(d) - 5)), "damaged"),
        ("state a folder", replaced_by(Path.mkdir, STATE), "should be a file"),
        ("state a link to nowhere", replaced_by(lambda p: p.symlink_to("nowhere"), STATE), "should be a file"),
        ("state is the adapter", lambda f: shutil.copy(f / WEIGHTS, f / STATE), "not saved together"),
        ("adapter is the state", lambda f: shutil.copy(f / STATE, f / WEIGHTS), "."),
        ("state of a moment before", put("first.lora_E", lambda t: t * 0.9, STATE), "not saved together"),
        ("r absurd", config(init_r=10**9, rank_pattern=None, target_r=1), "should have 1000000000"),
        ("A missing", tensors(lambda t: t.pop("first.lora_A"), STATE), "not saved together"),
        ("mask missing", tensors(lambda t: t.pop("rankwise_mask"), STATE), "only the model has 'rankwise_mask'"),
        ("extra state missing", tensors(lambda t: t.pop("_extra_state"), STATE), "_extra_state"),
        ("something more", tensors(lambda t: t.update(evil=torch.ones(2)), STATE), "'evil'"),
        ("mask of numbers", put("rankwise_mask", lambda t: t.float(), STATE), "rankwise_mask is torch.float32"),
        ("mask too short", put("rankwise_mask", lambda t: t[1:], STATE), r"rankwise_mask is \(11,\)"),
        ("scores with NaN", put("rankwise_sensitivity", spoil(torch.nan), STATE), "rankwise_sensitivity holds NaN"),
        ("head with NaN", put("head.modules_to_save.weight", spoil(torch.nan), STATE), "head.weight"),
        ("head of another shape", put("head.modules_to_save.weight", lambda t: t[1:], STATE), "head"),
        ("bias with NaN", put("first.bias", spoil(torch.nan), STATE), "first.base_layer.bias"),
        ("statistics of another shape", put("norm.running_mean", lambda t: t[1:], STATE), "norm.running_mean"),
        ("factors of doubles", tensors(lambda t: t.update({k: v.double() for k, v in t.items() if "lora" in k}), STATE),
         "not saved together|float64"),
        ("extra state of floats", put("_extra_state", lambda t: t.float(), STATE), "1-D int64 tensor"),
        ("extra state too short", put("_extra_state", lambda t: t[:7], STATE), "16 or more"),
        ("extra state without scales", put("_extra_state", lambda t: t[:16], STATE), "cut off"),
        ("extra state without history", put("_extra_state", lambda t: t[:20], STATE), "rank history"),
        ("scales without end", put("_extra_state", lambda t: t.index_fill(0, torch.tensor(16), 2**40), STATE),
         "cut off"),
        ("extra state cut off", put("_extra_state", lambda t: t[:-1], STATE), "cut off"),
        ("layout from the future", put("_extra_state", lambda t: t.index_fill(0, torch.tensor(0), 9), STATE),
         "layout 9"),
        ("step negative", put("_extra_state", lambda t: t.index_fill(0, torch.tensor(1), -3), STATE), "no run has"),
        ("schedule without pruning", put("_extra_state", lambda t: t.index_fill(0, torch.tensor(5), 99), STATE),
         "no step for pruning"),
        ("settings not finite", put("_extra_state", lambda t: t.index_fill(0, torch.tensor(10), 0x7FF0 << 48), STATE),
         "no run has"),
        ("ranks below 0", put("_extra_state", lambda t: t.index_fill(0, torch.tensor(len(t) - 1), -1), STATE), "below 0"),  # noqa: E501
    ],
    "default": [
        ("labelled ADALORA", config(peft_type="ADALORA", init_r=4, target_r=2, rank_pattern=None, alpha_pattern={}),
         "ADALORA takes"),
        ("r other", config(r=9), "has rank"),
        ("a layer missing", tensors(lambda t: [t.pop(k) for k in list(t) if "first.lora" in k]), "other layers"),
        ("a layer of another name", tensors(lambda t: t.update({k.replace("first", "third"): t.pop(k) for k in list(t)
                                                                 if "first.lora" in k})), "other layers"),
        ("history of other layers", content(HISTORY, lambda d: d.replace(b"first", b"third")), "other layers"),
        ("a layer with ranks in the history alone", content(HISTORY, lambda d: with_layer(d, 3)), "other layers"),
        ("A with NaN", put(LORA_A, spoil(torch.nan)), "holds NaN"),
    ],
    "default in training": [
        ("state cut off", content(STATE, lambda data: data[: len(data) // 2]), "can't be read as safetensors"),
        ("state is the adapter", lambda f: shutil.copy(f / WEIGHTS, f / STATE), "not saved together"),
        ("state of a moment before", put("first.lora_A", lambda t: t * 0.9, STATE), "not saved together"),
        ("adapter of a moment before", put(LORA_A, lambda t: t * 0.9), "not saved together"),
        ("run's configuration missing", lambda f: (f / RUN).unlink(), "no training_config.json"),
        ("run's configuration empty", content(RUN, lambda _: b""), "not valid JSON"),
        ("run's configuration a list", content(RUN, lambda _: b"[]"), "must hold a JSON object with"),
        ("run's configuration a folder", replaced_by(Path.mkdir, RUN), "should be a file"),
        ("run's configuration nested without end", replaced_by(deep, RUN), "not valid JSON"),
        ("run's configuration without checksums", run(lambda d: d.pop("adapter")), "must hold a JSON object with"),
        ("run's configuration of no state", run(lambda d: d.update(state=None)), "not saved together"),
        ("run's configuration with a text in it", run(lambda d: d.update(config="x")), "must hold a JSON object"),
        ("run of the paper's form", run(lambda d: d["config"].update(init_lora_weights=True)), "copy all files"),
        ("run of plain LoRA", run(lambda d: d["config"].update(peft_type="LORA")), "training_config.json"),
        ("run with a rank absurd", run(lambda d: d["config"].update(init_r=10**40)), "absurdly large"),
        ("run without a step for pruning", run(lambda d: d["config"].update(tinit=13)), "no step for pruning"),
    ],
    "lora as a pickle": [
        ("empty", content(PICKLE, lambda _: b""), "can't be read as a file of tensors only"),
        ("cut off", content(PICKLE, lambda data: data[: len(data) // 2]), "can't be read as a file of tensors"),
        ("text", content(PICKLE, lambda _: b"hello" * 50), "can't be read as a file of tensors only"),
        ("safetensors inside", lambda f: save_file({"a": torch.ones(2)}, f / PICKLE), "can't be read as a file"),
        ("a list", lambda f: torch.save([torch.ones(2)], f / PICKLE), "dictionary of tensors"),
        ("numbers", lambda f: torch.save({"a": 1}, f / PICKLE), "'a' is not a plain tensor"),
        ("keys are numbers", lambda f: torch.save({1: torch.ones(2)}, f / PICKLE), "dictionary of tensors"),
        ("a module", lambda f: torch.save(nn.Linear(2, 2), f / PICKLE), "can't be read as a file of tensors only"),
        ("a sparse tensor", lambda f: torch.save({LORA_A: torch.eye(3).to_sparse()}, f / PICKLE), "no plain tensor"),
        ("a tensor of no memory", lambda f: torch.save({LORA_A: torch.ones(2, device="meta")}, f / PICKLE), "plain"),
        ("a number repeated to 4 PB", lambda f: torch.save({LORA_A: torch.ones(1).expand(2**50)}, f / PICKLE), "plain"),
    ],
}  # fmt: skip

CASES = [
    pytest.param(kind, damage, message, door, id=f"{kind}-{name}-{door}".replace(" ", "_"))
    for kind, cases in DAMAGE.items()
    for name, damage, message in cases
    for door in DOORS
    if not (kind.endswith("in training") and door == "inference")
]


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True)
    return target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS)
def test_undamaged_folders_load_by_every_door(kind: str, door: str, good: dict[str, Path]) -> None:
    made = Door(door, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_works(made.load(good[kind]), trains=door != "inference")


@pytest.mark.parametrize(("kind", "damage", "message", "door"), CASES)
def test_damaged_folders_are_refused_and_change_nothing(
    kind: str, damage: Callable[[Path], None], message: str, door: str, good: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(good[kind], tmp_path / "adapter")
    damage(folder)
    assert_refused(folder, Door(door, kind), message)


# Code, paths and memory.


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("how", ["torch.save", "zipped by hand", "plain pickle", "in a tensor's place"])
@pytest.mark.parametrize("name", [PICKLE, WEIGHTS, STATE, CONFIG, HISTORY])
def test_pickled_code_does_not_run(name: str, how: str, good: dict[str, Path], tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    folder = copied(
        good["lora as a pickle" if name == PICKLE else "adalora in training"], tmp_path / "adapter"
    )
    content = {LORA_A: Malice(mark)} if how == "in a tensor's place" else Malice(mark)
    if how == "plain pickle":
        (folder / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, folder / name)
    if how == "zipped by hand":
        (folder / name).unlink()
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
            archive.writestr("archive/version", "3")
    for door in ("trainable", "attached"):
        assert_refused(folder, Door(door, "lora" if name == PICKLE else "adalora in training"))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malice(mark)))
    assert mark.exists(), "the attack should work, or the test shows nothing"


def test_a_compressed_pickle_is_refused_before_it_fills_the_memory(
    good: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(good["lora as a pickle"], tmp_path / "adapter")
    with zipfile.ZipFile(good["lora as a pickle"] / PICKLE) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data + b"\0" * 10**6)
    assert_refused(folder, Door("inference", "lora"), "compressed")


_opened: list[str] | None = None


def _note_opened(event: str, arguments: Any) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir", "socket.connect"):
        _opened.append(str(arguments[0]))


@contextmanager
def opened() -> Iterator[list[str]]:
    """All paths that are opened inside the context."""
    global _opened
    if not hasattr(sys, "_rankwise_test_audits"):
        sys.addaudithook(_note_opened)  # it can't be removed again
        sys._rankwise_test_audits = True  # type: ignore[attr-defined]
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


@pytest.mark.parametrize("kind", ["adalora in training", "lora"])
def test_no_path_in_a_configuration_is_opened(kind: str, good: dict[str, Path], tmp_path: Path) -> None:
    secret = copied(good[kind], tmp_path / "secret")
    folder = copied(good[kind], tmp_path / "adapter")
    config(
        base_model_name_or_path=str(secret),
        revision="../secret",
        auto_mapping={"base_model_class": str(secret), "parent_library": "os"},
        runtime_config={"path": str(secret)},
        megatron_core=str(secret),
    )(folder)
    for door in DOORS:
        with opened() as seen, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = Door(door, kind).load(folder)
        assert any(str(folder) in path for path in seen), "the adapter is opened, or the test shows nothing"
        assert not [path for path in seen if "secret" in path]
        assert_works(model, trains=door != "inference")


@pytest.mark.parametrize("made", [rw.AdaLoraConfig(init_r=10**9, target_modules=["first", "embed"]),
                                  rw.LoraConfig(r=10**9, target_modules=["first", "conv"]),
                                  rw.LoraConfig(rank_pattern={"second": 10**12}, target_modules=["second"])])  # fmt: skip  # noqa: E501
def test_absurd_ranks_are_refused_before_they_fill_the_memory(made: Any) -> None:
    model = base()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match="set it to at most 1024"):
        rw.get_peft_model(model, made)
    snapshot.assert_unchanged()


def test_ranks_above_a_small_layers_widths_are_taken() -> None:
    model = rw.get_peft_model(base(), rw.AdaLoraConfig(init_r=64, total_step=5, target_modules=["first"]))
    assert model.first.lora_A["default"].shape == (64, 8)


def test_a_file_larger_than_the_memory_is_refused_by_its_header(
    good: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(good["lora"], tmp_path / "adapter")
    rows = 2**31
    table = json.dumps(
        {LORA_A: {"dtype": "F32", "shape": [rows, 8], "data_offsets": [0, rows * 32]}}
    ).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(table)) + table)
        try:
            file.truncate(8 + len(table) + rows * 32)  # it takes no space on the disk
        except OSError:
            pytest.skip("The file system has no files of 64 GB.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(folder, Door("inference", "lora"), "no tensors of|incomplete|Cannot allocate memory")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB"


def test_a_folder_that_is_not_there_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    for place in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        assert_refused(place, Door("inference", "lora"))
        assert_refused(place, Door("attached", "lora"))


# Fuzzing: after random damage, a folder is refused and the model unchanged, or it is loaded and sound.

NASTY = [
    None, True, False, 0, -1, 1, 2, 3, 4, 5, 7, 1e-300, 0.5, 1.5, 1e300, 10**9, 2**53, 10**40, float("nan"), float("inf"),  # noqa: E501
    "", "x", "LORA", "ADALORA", "all", "../../etc/passwd", "(", ".*", "\ud800", "\0", [], [None], ["first"], ["x"], [[]],  # noqa: E501
    {}, {"first": 3}, {"first": None}, {"first.lora_E": [True] * 4}, {"": 1},
]  # fmt: skip


def damage_bytes(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data)) if data else 0
    near_start = rng.randrange(min(len(data), 400)) if data else 0
    how = rng.choice(
        ["flip", "flip near the start", "cut", "cut the start", "zeros", "noise", "insert", "append", "empty"]
    )
    if how.startswith("flip") and data:
        data[near_start if "start" in how else place] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[place:]
    elif how == "cut the start":
        del data[:place]
    elif how in ("zeros", "noise"):
        length = min(rng.randrange(1, 64), len(data) - place)
        data[place : place + length] = bytes(length) if how == "zeros" else rng.randbytes(length)
    elif how in ("insert", "append"):
        data[place if how == "insert" else len(data) :] = rng.randbytes(rng.randrange(1, 20))
    else:
        data.clear()
    path.write_bytes(bytes(data))
    return how


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """All places in nested JSON where a value can be changed."""
    keys = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    return [(value, key) for key in keys] + [spot for key in keys for spot in _spots(value[key])]


def damage_json(rng: random.Random, path: Path) -> str:
    try:
        data = json.loads(path.read_text())
        holder, key = rng.choice(_spots(data))
    except (ValueError, IndexError):
        return damage_bytes(rng, path)
    how = rng.choice(["nasty", "nasty", "another's", "remove", "rename", "add", "twist"])
    other_holder, other = rng.choice(_spots(data))
    if how == "remove":
        del holder[key]
    elif how == "another's":
        holder[key] = copy.deepcopy(other_holder[other])
    elif how == "rename" and isinstance(holder, dict):
        holder[f"{key}{rng.choice(['x', '.default', ' ', ''])}"] = holder.pop(key)
    elif how == "add" and isinstance(holder, dict):
        holder[rng.choice(["use_dora", "x", "r", "init_r", "alpha_pattern", "bias"])] = rng.choice(NASTY)
    elif how == "twist" and isinstance(holder[key], bool):
        holder[key] = not holder[key]
    elif how == "twist" and isinstance(holder[key], (int, float)):
        holder[key] += rng.choice([1, -1, 0.5])
    else:
        holder[key] = copy.deepcopy(rng.choice(NASTY))
    path.write_text(json.dumps(data, ensure_ascii=True))
    return f"{how} {key}"


def damage_tensors(rng: random.Random, path: Path) -> str:
    try:
        held = {key: value.clone() for key, value in load_file(path).items()}
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
    except Exception:
        return damage_bytes(rng, path)
    if not held:
        return "nothing there"
    key, other = rng.choice(sorted(held)), rng.choice(sorted(held))
    tensor = held[key]
    how = rng.choice(
        [
            "remove",
            "rename",
            "copy",
            "swap",
            "dtype",
            "turn",
            "flat",
            "cut",
            "grow",
            "empty",
            "value",
            "number",
        ]
    )
    if how == "remove":
        del held[key]
    elif how == "rename":
        held[rng.choice([f"{key}x", key.replace("first", "conv"), key[1:], "", "x.lora_A"])] = held.pop(key)
    elif how == "copy":
        held[key] = held[other].clone()
    elif how == "swap":
        held[key], held[other] = held[other], held[key]
    elif how == "dtype":
        held[key] = tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool,
                                          torch.float8_e4m3fn, torch.complex64, torch.uint8]))  # fmt: skip
    elif how == "turn":
        held[key] = tensor.T if tensor.dim() == 2 else tensor.flip(0) if tensor.dim() else tensor
    elif how == "flat":
        held[key] = tensor.flatten() if rng.random() < 0.5 else tensor[None]
    elif how == "cut":
        held[key] = tensor[: max(len(tensor) - 1, 0)] if tensor.dim() else tensor
    elif how == "grow":
        held[key] = torch.cat([tensor, tensor], rng.randrange(tensor.dim())) if tensor.dim() else tensor
    elif how == "empty":
        held[key] = tensor.new_zeros(rng.choice([(0,), (0, 8), (8, 0), ()]))
    elif tensor.numel():
        wild = (
            [torch.nan, torch.inf, -torch.inf, 1e38, 0.0, 3.0]
            if tensor.is_floating_point()
            else [0, 1, -1, 5, 2**40]
        )
        value = rng.choice(wild)
        held[key].view(-1)[rng.randrange(tensor.numel())] = (
            value if tensor.dtype != torch.bool else bool(value)
        )
    held = {name: value.contiguous().clone() for name, value in held.items()}
    if rng.random() < 0.8:
        write_tensor_file(path, held)
    else:
        save_file(held, path, metadata=metadata)  # with an old checksum
    return f"{how} {key}"


def damage_header(rng: random.Random, path: Path) -> str:
    try:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        holder, key = rng.choice(_spots(table))
    except (ValueError, IndexError, struct.error):
        return damage_bytes(rng, path)
    holder[key] = rng.choice(
        [*NASTY, "F32", "BF16", "F8_E4M3", "F4", "I64", [2**40, 2**40], [0, 2**63], [8, 8]]
    )
    text = json.dumps(table).encode()
    size = rng.choice([len(text)] * 5 + [0, len(text) - 1, 2**31, 2**63])
    path.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])
    return f"header {key}"


def damage_folder(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """Do one random kind of damage. Return its description."""
    path = rng.choice(
        sorted(each for each in folder.iterdir() if each.is_file() and not each.is_symlink()) or [folder]
    )
    kinds: list[Callable[[random.Random, Path], str]] = [damage_bytes]
    if path.suffix == ".json":
        kinds += [damage_json] * 4
    elif path.suffix == ".safetensors":
        kinds += [damage_tensors] * 4 + [damage_header]
    if path == folder:
        return "nothing left"
    if rng.random() > 0.1:
        return f"{path.name}: {rng.choice(kinds)(rng, path)}"
    how = rng.choice(["gone", "folder", "link to nowhere", "another's", "another file"])
    donor = rng.choice(others)
    source = donor / path.name if how == "another's" else rng.choice(sorted(donor.iterdir()))
    content = source.read_bytes() if source.is_file() else b""
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link to nowhere":
        path.symlink_to("nowhere")
    elif how != "gone":
        path.write_bytes(content)
    return f"{path.name}: {how} ({source.name} of {donor.parent.name})"


@pytest.mark.parametrize("rounds", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_random_damage_is_refused_or_does_no_harm(good: dict[str, Path], tmp_path: Path, rounds: int) -> None:
    """RANKWISE_FUZZ_ROUNDS and RANKWISE_FUZZ_SEED set the number of rounds and the seed."""
    rounds = int(os.environ.get("RANKWISE_FUZZ_ROUNDS", rounds))
    seed = int(os.environ.get("RANKWISE_FUZZ_SEED", "0"))
    outcomes: Counter[str] = Counter()
    for number in range(rounds):
        rng = random.Random(f"{seed}/{number}")
        torch.manual_seed(number)
        kind, door_name = rng.choice(sorted(good)), rng.choice(DOORS)
        folder = copied(good[kind], tmp_path / str(number))
        others = sorted(good.values())
        done = [damage_folder(rng, folder, others) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        door = Door(door_name, kind)
        snapshot = Snapshot(door.model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    model = door.load(folder)
                except Exception as error:
                    check_message(error, folder)
                    snapshot.assert_unchanged()
                    outcomes[f"refused: {type(error).__name__}"] += 1
                else:
                    assert_works(model, trains=door_name != "inference")
                    outcomes["loaded, and sound"] += 1
        except BaseException as error:
            raise AssertionError(f"round {number} of seed {seed}, {kind}, {door_name}: {done}") from error
        shutil.rmtree(folder)
    print(f"{rounds} rounds of seed {seed}: {dict(outcomes)}")
    assert outcomes["loaded, and sound"] < rounds / 2
