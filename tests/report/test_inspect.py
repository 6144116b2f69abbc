"""Reading adapter folders that PEFT and rankwise wrote, and messages about broken ones."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rankwise as rw
from expert_world import EXPERTS, tiny_moe
from rankwise.report.inspect import AdapterReport, inspect_adapter
from rankwise.report.show import render_terminal, save_heatmap
from rankwise.run.history import RankHistory
from tiny import bert, llama, token_batches

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ["query", "key", "value"]


class Mixed(nn.Module):
    """One layer of each kind that LoRA adapts, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(4, 6, 3)
        self.fc1 = nn.Linear(8, 10)
        self.fc2 = nn.Linear(10, 4)


def peft_adapter(
    folder: Path, model: nn.Module, config: Any, before_saving: Callable[[Any], None] | None = None
) -> Path:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, config)
    if before_saving:
        before_saving(adapted)
    adapted.save_pretrained(str(folder))
    return folder


def adalora(ranks: list[int] | None = None, **changes: Any) -> tuple[Any, Callable[[Any], None] | None]:
    """PEFT's AdaLoRA for `bert`, and a function that sets the layers' ranks."""
    peft = pytest.importorskip("peft")
    options = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3, "total_step": 10, "lora_alpha": 12}
    config = peft.AdaLoraConfig(target_modules=TARGETS, task_type="SEQ_CLS", **{**options, **changes})

    def choose(model: Any) -> None:
        names = [name for name, _ in model.named_parameters() if "lora_E" in name]
        assert ranks is not None and len(ranks) == len(names)
        pattern = {
            name.removeprefix("base_model.model.").removesuffix(".default"): [True] * rank
            + [False] * (6 - rank)
            for name, rank in zip(names, ranks, strict=True)
        }
        model.peft_config["default"].rank_pattern = pattern

    return config, choose if ranks is not None else None


def safetensors(path: Path, **tensors: torch.Tensor) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A small LoRA folder, made without PEFT."""
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]})
    )
    prefix = "base_model.model.h.0.q.lora_"
    safetensors(
        folder / WEIGHTS, **{f"{prefix}A.weight": torch.ones(4, 8), f"{prefix}B.weight": torch.ones(6, 4)}
    )
    return folder


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config = {name: value for name, value in {**config, **changes}.items() if value != "REMOVE"}
    (folder / CONFIG).write_text(json.dumps(config))


def printed(folder: Path, width: int = 100) -> str:
    console = pytest.importorskip("rich.console").Console(width=width, file=io.StringIO())
    render_terminal(inspect_adapter(folder), console)
    text: str = console.file.getvalue()
    return text


# Adapters of PEFT.


def test_pefts_adalora_with_mixed_ranks(tmp_path: Path) -> None:
    ranks = [0, 1, 2, 3, 6, 6]
    config, choose = adalora(ranks)
    report = inspect_adapter(peft_adapter(tmp_path / "adapter", bert(), config, choose))
    assert report.method == "AdaLoRA"
    assert (report.init_r, report.target_r, report.budget, report.target) == (6, 3, 36, 18)
    assert report.total_rank == sum(ranks)
    assert [layer.path for layer in report.layers] == [
        f"bert.encoder.layer.{n}.attention.self.{kind}" for n in range(2) for kind in TARGETS
    ]
    assert [layer.rank for layer in report.layers] == ranks
    assert [layer.parameters for layer in report.layers] == [rank * (32 + 32 + 1) for rank in ranks]
    assert report.scale == pytest.approx(12 / (6 + 1e-5))
    assert report.schedule == {"tinit": 2, "tfinal": 3, "total_step": 10, "deltaT": 1}
    assert [(module.path, module.parameters) for module in report.saved_modules] == [
        ("classifier", 32 * 3 + 3)
    ]
    assert report.dtypes == {"float32": report.parameters}
    assert report.task_type == "SEQ_CLS"
    assert report.target_modules == sorted(TARGETS)
    assert report.written_by is not None and report.written_by.startswith("PEFT ")
    assert report.notes == []
    assert report.files[WEIGHTS] == (tmp_path / "adapter" / WEIGHTS).stat().st_size


def test_pefts_adalora_before_any_allocation(tmp_path: Path) -> None:
    config, _ = adalora()
    report = inspect_adapter(peft_adapter(tmp_path / "adapter", bert(), config))
    assert report.total_rank == report.budget == 36
    assert report.notes == ["Saved before pruning was done: the budget is 36, its target 18."]


def test_pefts_lora_of_every_kind_of_layer(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        target_modules=["emb", "conv", "fc1"],
        rank_pattern={"fc1": 2},
        alpha_pattern={"fc1": 32},
        modules_to_save=["fc2"],
        bias="lora_only",
    )
    report = inspect_adapter(peft_adapter(tmp_path / "adapter", Mixed(), config))
    layers = {layer.path: (layer.kind, layer.rank, layer.init_r, layer.scale) for layer in report.layers}
    assert layers == {"emb": ("embedding", 4, 4, 2), "conv": ("conv", 4, 4, 2), "fc1": ("linear", 2, 2, 16)}
    sizes = {layer.path: layer.parameters for layer in report.layers}
    assert sizes == {"emb": 4 * (20 + 8), "conv": 4 * (4 * 9 + 6), "fc1": 2 * (8 + 10)}
    assert [(module.path, module.parameters) for module in report.saved_modules] == [("fc2", 44)]
    assert report.bias_parameters == 6 + 10
    assert report.other_parameters == 0
    assert report.parameters == sum(sizes.values()) + 44 + 16
    assert (report.method, report.target_r, report.target, report.schedule, report.scale) == (
        "LoRA", None, None, None, None,
    )  # fmt: skip
    assert report.notes == []


@pytest.mark.parametrize(
    ("options", "method"),
    [({"use_rslora": True}, "rsLoRA"), ({"use_dora": True}, "DoRA"), ({"bias": "all"}, "LoRA")],
)
def test_pefts_variants_of_lora(tmp_path: Path, options: dict[str, Any], method: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc1"], modules_to_save=["fc2"], **options)
    report = inspect_adapter(peft_adapter(tmp_path / "adapter", Mixed(), config))
    assert report.method == method
    assert report.scale == (4.0 if method == "rsLoRA" else 2.0)
    assert [(layer.rank, layer.parameters) for layer in report.layers] == [
        (4, 4 * 18 + (10 if method == "DoRA" else 0))
    ]
    assert [(module.path, module.parameters) for module in report.saved_modules] == [("fc2", 44)]
    assert report.notes == []


def test_half_precision_is_reported(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = peft_adapter(
        tmp_path / "adapter",
        Mixed(),
        peft.LoraConfig(r=2, target_modules=["fc1"]),
        lambda model: model.bfloat16(),
    )
    assert inspect_adapter(folder).dtypes == {"bfloat16": 2 * 18}


# Adapters of rankwise.


@pytest.fixture
def own(tmp_path: Path) -> Path:
    config = rw.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=1,
        tfinal=1,
        total_step=4,
        target_modules="all-linear",
        modules_to_save=["lm_head"],
    )
    model = rw.get_peft_model(llama(), config)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for batch in token_batches(4):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


IN_FOUR_STEPS = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 4, "lora_alpha": 8}


def report_after_four_steps(
    model: Any, optimizer: torch.optim.Optimizer, shape: torch.Size, folder: Path
) -> AdapterReport:
    """Train on noise of this shape, save, and inspect."""
    for step in range(4):
        model(torch.randn(shape, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return inspect_adapter(folder)


def test_more_narrow_ranks_than_the_target_are_not_reported_as_unfinished(tmp_path: Path) -> None:
    """The budget counts parameters: 17 narrow ranks may cost as much as 16 of average size."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 60))
    model = rw.get_peft_model(layers, rw.AdaLoraConfig(**IN_FOUR_STEPS, target_modules=["0", "1"]))
    # The wide layer does not train, so its directions have no worth.
    optimizer = torch.optim.SGD([model[0].lora_B["default"], model[0].lora_A["default"]], lr=0.1)
    report = report_after_four_steps(model, optimizer, torch.Size([3, 4]), tmp_path / "own")
    assert report.total_rank > (report.target or 0)
    assert report.notes == []
    assert report.layers[0].scale == 8 / 2, "the one that the run ends with"
    assert report.scale == report.layers[0].scale


def test_a_frozen_layer_is_reported_with_the_scale_at_which_it_was_frozen(tmp_path: Path) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model = rw.get_peft_model(layers, rw.AdaLoraConfig(**IN_FOUR_STEPS, target_modules=["0", "1"]))
    model[1].requires_grad_(False)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.1)
    report = report_after_four_steps(model, optimizer, torch.Size([3, 8]), tmp_path / "own")
    scales = [layer.scale for layer in report.layers]
    inputs = torch.randn(3, 8)
    tensors = load_file(tmp_path / "own" / "adapter_model.safetensors")
    for name, scale in zip(("0", "1"), scales, strict=True):
        module = model.get_submodule(name)
        A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        base = torch.nn.functional.linear(inputs, module.weight, module.bias)
        assert torch.allclose(module(inputs), base + scale * inputs @ A.T @ B.T, atol=1e-4)
    assert scales[1] == pytest.approx(8 / 6, rel=1e-5) and report.scale is None


def test_rankwises_own_adapter_with_its_history(own: Path) -> None:
    report = inspect_adapter(own)
    assert report.history is not None
    last = report.history.records[-1]
    ranks = {layer.path: layer.rank for layer in report.layers}
    assert list(ranks) == report.history.layers
    assert list(ranks.values()) == last.ranks
    assert (report.total_rank, report.target) == (28, 28)
    assert [module.path for module in report.saved_modules] == ["lm_head"]
    assert report.notes == []


def test_the_report_is_json(own: Path) -> None:
    report = inspect_adapter(own)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["total_rank"] == 28 and data["budget"] == 56
    assert data["layers"][0].keys() == {"path", "kind", "rank", "init_r", "scale", "parameters"}
    assert data["history"]["layers"] == [layer["path"] for layer in data["layers"]]


def test_the_report_reads_well_in_a_terminal(own: Path) -> None:
    text = printed(own)
    for said in ("AdaLoRA", "model.layers.0.self_attn.q_proj", "28 in 14 layers", "target 28", "lm_head", WEIGHTS,
                 "warm-up to step 1, pruning every step to 3, final to 4", "model.layers\n"):  # fmt: skip
        assert said in text, said
    assert max(map(len, text.splitlines())) <= 100


def test_layers_that_are_named_by_whole_paths_are_not_listed_twice(tmp_path: Path) -> None:
    """An adapter with a layer at rank 0 names all others: 200 lines before the rank, in a model of 30 blocks."""
    paths = sorted(path for path, module in llama().named_modules() if isinstance(module, nn.Linear))[-9:]
    for targets, said in ((paths[:8], f"{paths[0]}, "), (paths, "9 layers, each named by its whole path")):
        rw.get_peft_model(llama(), rw.LoraConfig(r=2, target_modules=targets)).save_pretrained(tmp_path / "a")
        assert re.search(f"adapts *{re.escape(said)}", printed(tmp_path / "a"))
        assert inspect_adapter(tmp_path / "a").to_dict()["target_modules"] == sorted(targets)


def test_experts_are_listed_among_the_adapted_layers(tmp_path: Path) -> None:
    for targets, said in ((["q_proj"], "q_proj; parameters "), ([], "parameters ")):
        config = rw.LoraConfig(r=2, target_modules=targets, target_parameters=EXPERTS)
        rw.get_peft_model(tiny_moe(), config).save_pretrained(tmp_path / "adapter")
        expected = f"adapts *{said}experts.down_proj, experts.gate_up_proj"
        assert re.search(expected, printed(tmp_path / "adapter"))
        assert inspect_adapter(tmp_path / "adapter").to_dict()["target_parameters"] == sorted(EXPERTS)


def test_the_heat_map_is_written(own: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_heatmap(inspect_adapter(own), tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


# Checkpoints, histories and other files in an adapter's folder.


def test_a_trainers_checkpoint_is_recognized(lora: Path) -> None:
    checkpoint = lora.rename(lora.parent / "checkpoint-20")
    state = {"global_step": 20, "max_steps": 60, "epoch": 1.25}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "optimizer.pt").write_bytes(b"x" * 1500)
    report = inspect_adapter(checkpoint)
    assert report.checkpoint is not None
    assert (report.checkpoint.step, report.checkpoint.total_steps, report.checkpoint.epoch) == (20, 60, 1.25)
    text = printed(checkpoint)
    assert "a trainer's checkpoint at step 20 of 60 (epoch 1.25)" in text
    assert "optimizer.pt 1.5 kB" in text


@pytest.mark.parametrize("state", [None, "{", "[]", '{"global_step": "x", "epoch": null}'])
def test_a_checkpoint_is_known_by_its_name_alone(lora: Path, state: str | None) -> None:
    checkpoint = lora.rename(lora.parent / "checkpoint-20")
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    found = inspect_adapter(checkpoint).checkpoint
    assert found is not None and (found.step, found.total_steps) == (20, None)


def test_the_state_of_a_run_is_reported(lora: Path) -> None:
    assert not inspect_adapter(lora).resumable
    safetensors(lora / "training_state.safetensors", step=torch.tensor(3))
    assert inspect_adapter(lora).resumable
    assert "can be resumed" in printed(lora)


def test_a_broken_or_foreign_history_is_left_out_with_a_note(lora: Path) -> None:
    (lora / "rank_history.json").write_text("{")
    assert "rank_history.json is not a rank history" in inspect_adapter(lora).notes[0]
    RankHistory(["other"]).save(lora / "rank_history.json")
    report = inspect_adapter(lora)
    assert report.history is None and "of other layers" in report.notes[0]
    assert "of other layers" in printed(lora)


def test_tensors_of_another_rank_than_the_configurations_are_noted(lora: Path) -> None:
    reconfigure(lora, r=8)
    assert inspect_adapter(lora).notes == [
        "adapter_config.json gives 'h.0.q' rank 8, but its tensors have 4: loading will fail."
    ]


def test_layers_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    paths = [
        *(f"model.encoder.layers.{n}.self_attn.{kind}" for n in (0, 2, 10) for kind in ("q_proj", "k_proj")),
        *(
            f"model.decoder.layers.{n}.{kind}"
            for n in (0, 11)
            for kind in ("self_attn.v_proj", "encoder_attn.q_proj")
        ),
        "proj_out",
    ]
    names = [f"base_model.model.{path}.lora_{factor}.weight" for path in paths for factor in "AB"]
    safetensors(folder / WEIGHTS, **{name: torch.ones(1, 1) for name in names})
    assert [layer.path for layer in inspect_adapter(folder).layers] == paths


# Broken folders.


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, lora: Path) -> None:
    with pytest.raises(ValueError, match="There is no folder"):
        inspect_adapter(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a file, and an adapter is a folder"):
        inspect_adapter(lora / WEIGHTS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        inspect_adapter(tmp_path / "empty")


def test_a_folder_of_adapters_points_to_the_latest(lora: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10"):
        shutil.copytree(lora, lora.parent / "run" / name)
    with pytest.raises(ValueError, match=r"Give .*checkpoint-10\."):
        inspect_adapter(lora.parent / "run")


def test_a_whole_model_is_told_apart(lora: Path) -> None:
    (lora / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"but no adapter_config\.json"):
        inspect_adapter(lora)
    (lora / WEIGHTS).unlink()
    (lora / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a whole model, not an adapter"):
        inspect_adapter(lora)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"\xff\xfe", "utf-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_configuration(lora: Path, text: bytes, wrong: str) -> None:
    (lora / CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=wrong) as caught:
        inspect_adapter(lora)
    assert str(lora / CONFIG) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"peft_type": "REMOVE"}, "`peft_type` is missing"),
        ({"peft_type": "IA3"}, "`peft_type` is 'IA3'"),
        ({"r": "REMOVE"}, "`r` is missing"),
        ({"r": "4"}, "`r` is '4'"),
        ({"r": True}, "`r` is True"),
        ({"lora_alpha": None}, "`lora_alpha` is missing"),
        ({"lora_alpha": -1}, "`lora_alpha` is -1"),
        ({"peft_type": "ADALORA"}, "`init_r` is missing"),
        ({"peft_type": "ADALORA", "init_r": 4, "target_r": 2}, 'Set it to "LORA"'),
        ({"rank_pattern": {"q": "x"}}, "`rank_pattern` must hold numbers"),
        ({"rank_pattern": [1]}, "`rank_pattern` is broken"),
        ({"alpha_pattern": {"(": 3}}, "`alpha_pattern` is broken"),
        ({"modules_to_save": 3}, "`modules_to_save` must be a list"),
        ({"target_modules": 3}, "`target_modules` must be"),
    ],
)
def test_a_configuration_that_contradicts_itself_or_the_tensors(
    lora: Path, changes: dict[str, Any], wrong: str
) -> None:
    reconfigure(lora, **changes)
    with pytest.raises(ValueError) as caught:
        inspect_adapter(lora)
    assert wrong in str(caught.value)
    assert str(lora / CONFIG) in str(caught.value)


def test_adalora_called_lora_and_a_pattern_of_other_layers(tmp_path: Path) -> None:
    config, choose = adalora([0, 1, 2, 3, 6, 6])
    folder = peft_adapter(tmp_path / "adapter", bert(), config, choose)
    pattern = json.loads((folder / CONFIG).read_text())["rank_pattern"]
    reconfigure(folder, peft_type="LORA", rank_pattern={})
    with pytest.raises(ValueError, match='Set it to "ADALORA"'):
        inspect_adapter(folder)
    reconfigure(folder, peft_type="ADALORA", rank_pattern={**pattern, "gone.lora_E": [True]})
    with pytest.raises(ValueError, match="names 'gone', of which"):
        inspect_adapter(folder)
    key = next(iter(pattern))
    reconfigure(folder, rank_pattern={**pattern, key: [True] * 4 + [False] * 2})
    with pytest.raises(ValueError, match="keeps 4 of 6 ranks"):
        inspect_adapter(folder)
    reconfigure(folder, rank_pattern={key: 3})
    with pytest.raises(ValueError, match="must have a list of true and false"):
        inspect_adapter(folder)


@pytest.mark.parametrize("left", [0, 5, 60, -1])
def test_a_file_that_is_cut_off(lora: Path, left: int) -> None:
    data = (lora / WEIGHTS).read_bytes()
    (lora / WEIGHTS).write_bytes(data[:left])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is broken or cut off"):
        inspect_adapter(lora)


def test_a_pointer_in_place_of_the_file(lora: Path) -> None:
    (lora / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        inspect_adapter(lora)


def test_no_tensors_at_all(lora: Path) -> None:
    (lora / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        inspect_adapter(lora)


def test_a_pickle_is_refused_with_a_command_that_converts_it(lora: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(lora / WEIGHTS), lora / "adapter_model.bin")
    (lora / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="a pickle") as caught:
        inspect_adapter(lora)
    command = str(caught.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", command], cwd=lora, check=True)
    assert inspect_adapter(lora).total_rank == 4


A, B = "base_model.model.h.0.q.lora_A.weight", "base_model.model.h.0.q.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "wrong"),
    [
        ({A: torch.ones(4, 8)}, "'h.0.q' has lora_A, but LORA takes lora_A, lora_B"),
        ({A: torch.ones(4, 8), B: torch.ones(6, 3)}, "different ranks"),
        ({A: torch.ones(4), B: torch.ones(6, 4)}, "which no factor has"),
        ({"model.weight": torch.ones(2)}, "holds no LoRA tensors"),
        ({}, "nothing at all"),
        ({A.replace(".weight", ".default.weight"): torch.ones(4, 8)}, "raw state of a running model"),
        ({A.removesuffix("A.weight") + "E.default": torch.ones(4, 1)}, "raw state of a running model"),
    ],
)
def test_tensors_that_are_no_adapter(lora: Path, tensors: dict[str, torch.Tensor], wrong: str) -> None:
    safetensors(lora / WEIGHTS, **tensors)
    with pytest.raises(ValueError) as caught:
        inspect_adapter(lora)
    assert wrong in str(caught.value)
    assert str(lora / WEIGHTS) in str(caught.value)


def test_names_that_peft_will_not_find_are_noted(lora: Path) -> None:
    names = {name.removeprefix("base_model.model."): torch.ones(4, 4) for name in (A, B)}
    safetensors(lora / WEIGHTS, **names)
    assert "PEFT will not find them" in inspect_adapter(lora).notes[0]


def test_only_the_header_is_read(own: Path) -> None:
    data = bytearray((own / WEIGHTS).read_bytes())
    data[-7] ^= 8
    (own / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        rw.PeftModel.from_pretrained(llama(), own)
    assert inspect_adapter(own).total_rank == 28


def test_lora_of_a_grouped_convolution_is_no_contradiction(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    rw.get_peft_model(model, rw.LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path)
    assert [(each.kind, each.rank) for each in inspect_adapter(tmp_path).layers] == [("conv", 4)]
