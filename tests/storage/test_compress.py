"""A compressed adapter is the best of its size, exact if nothing is cut, and readable by PEFT."""

from __future__ import annotations

import json
import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.method.truncation import kept_by, parameters_of, ranks_for_budget, ranks_for_share
from rankwise.recipes import load_recipe, train
from rankwise.storage.updates import read_updates
from recipe_world import save_tiny_model, write_recipe, write_table

peft = pytest.importorskip("peft")


class Body(nn.Module):
    """A user's own model with layers of different widths, an embedding and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 12)
        self.wide = nn.Linear(12, 30, bias=False)
        self.narrow = nn.Linear(30, 8)
        self.conv = nn.Conv2d(2, 6, (3, 2), padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.narrow(torch.relu(self.wide(self.words(ids))))
        return self.head(hidden + self.conv(hidden.view(2, 2, 4, -1)).mean())


IDS = torch.arange(2 * 8).view(2, 8) % 20
TARGETS = ["words", "wide", "narrow"]


def of_peft(folder: Path, kind: str) -> tuple[Path, torch.Tensor]:
    """An adapter that PEFT wrote, with visible weights and a decreasing spectrum; and its outputs."""
    if kind == "adalora":
        config: Any = peft.AdaLoraConfig(
            init_r=5, target_r=2, total_step=9, tinit=1, tfinal=2, target_modules=TARGETS[1:]
        )  # PEFT has no AdaLoRA for embeddings
    else:
        changes: dict[str, Any] = {
            "linear": {"target_modules": ["wide", "narrow", "head"]},
            "lora": {"target_modules": [*TARGETS, "conv"]},
            "rslora": {"use_rslora": True},
            "patterns": {"rank_pattern": {"wide": 3}, "alpha_pattern": {"narrow": 12}},
            "head": {"modules_to_save": ["head"]},
        }[kind]
        config = peft.LoraConfig(**{"r": 5, "lora_alpha": 7, "target_modules": TARGETS, **changes})
    model = peft.get_peft_model(Body(), config).eval()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "ranknum" not in name:
            fall = 0.6 ** torch.arange(max(parameter.shape))
            axis = 1 if "lora_B" in name else 0
            shape = [1] * parameter.dim()
            shape[axis] = parameter.shape[axis]
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * fall[: parameter.shape[axis]].view(shape)
        elif "modules_to_save" in name:
            parameter.data.normal_(generator=generator)
    model.save_pretrained(folder)
    return folder, model(IDS).detach()


def products(folder: Path) -> dict[str, torch.Tensor]:
    return {path: (each.B @ each.A).double() for path, each in read_updates(folder).layers.items()}


@pytest.mark.parametrize("kind", ["lora", "adalora", "rslora", "patterns", "head"])
def test_an_adapter_of_peft_that_keeps_everything_computes_the_same_in_peft(
    tmp_path: Path, kind: str
) -> None:
    folder, expected = of_peft(tmp_path / "own", kind)
    compression = rw.compress_adapter(tmp_path / "cut", folder, keep=1.0)
    assert compression.lost < 1e-12
    loaded = peft.PeftModel.from_pretrained(Body(), tmp_path / "cut").eval()
    torch.testing.assert_close(loaded(IDS), expected, atol=1e-4, rtol=1e-4)
    ours = rw.PeftModel.from_pretrained(Body(), tmp_path / "cut").eval()
    torch.testing.assert_close(ours(IDS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("goal", [{"rank": 2}, {"parameters": 150}, {"keep": 0.9}])
def test_the_reported_loss_is_the_real_one(tmp_path: Path, goal: dict[str, Any]) -> None:
    folder, _ = of_peft(tmp_path / "own", "patterns")
    compression = rw.compress_adapter(tmp_path / "cut", folder, **goal)
    before, after = products(folder), products(tmp_path / "cut")
    whole = sum(float(each.square().sum()) for each in before.values())
    gone = 0.0
    for layer in compression.layers:
        error = before[layer.path] - after.get(layer.path, 0)
        gone += float(error.square().sum())
        assert math.isclose(
            layer.lost, float(error.square().sum() / before[layer.path].square().sum()), abs_tol=1e-6
        )
        best = torch.linalg.svdvals(before[layer.path])[layer.rank :].square().sum()
        assert math.isclose(float(error.square().sum()), float(best), abs_tol=1e-5)
    assert math.isclose(compression.lost, gone / whole, abs_tol=1e-6)
    written = sum(t.numel() for t in load_file(tmp_path / "cut" / "adapter_model.safetensors").values())
    assert written == compression.parameters
    if "keep" in goal:
        assert compression.lost <= 0.1 + 1e-9
    if "parameters" in goal:
        assert compression.parameters <= 150


@pytest.mark.parametrize("size", [1, 2, 3, 0.5, 0.9])
def test_at_the_size_of_pefts_own_conversion_less_is_lost(tmp_path: Path, size: float) -> None:
    """PEFT's size is one rank for all layers if it is an integer; if it is a fraction, each layer keeps that share.

    The adapter is PEFT's LoRA, because PEFT converts no AdaLoRA.
    """
    folder, _ = of_peft(tmp_path / "own", "linear")
    model = peft.PeftModel.from_pretrained(Body(), folder)
    _, tensors = peft.convert_to_lora(model, rank=size)
    theirs: dict[str, torch.Tensor] = {}
    for key, A in tensors.items():
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            theirs[path] = (tensors[key.replace("lora_A", "lora_B")] @ A).double()
    parameters = sum(tensor.numel() for tensor in tensors.values())
    compression = rw.compress_adapter(tmp_path / "cut", folder, parameters=parameters)
    assert compression.parameters <= parameters
    before = products(folder)
    their_loss = sum(float((before[path] - theirs.get(path, 0)).square().sum()) for path in before)
    whole = sum(float(each.square().sum()) for each in before.values())
    assert compression.lost <= their_loss / whole + 1e-6


spectra = st.dictionaries(
    st.sampled_from("abcde"),
    st.lists(st.floats(0.0, 100.0), min_size=1, max_size=6).map(lambda values: sorted(values, reverse=True)),
    min_size=1,
)
widths = st.fixed_dictionaries({name: st.integers(1, 50) for name in "abcde"})


@settings(deadline=None)
@given(spectra, widths, st.integers(0, 400))
def test_a_budget_is_kept_and_no_equal_ranks_within_it_keep_more(
    squares: dict[str, list[float]], widths: dict[str, int], budget: int
) -> None:
    ranks = ranks_for_budget(squares, widths, budget)
    assert parameters_of(ranks, widths) <= budget
    for rank in range(1, 7):
        equal = {path: min(rank, len(values)) for path, values in squares.items()}
        if sum(rank * widths[path] for path in squares) <= budget:
            assert kept_by(squares, equal) <= kept_by(squares, ranks) + 1e-9
        # The bound is the budget filled with fractions of directions, which nothing can beat. At least half is kept.
    values = sorted(
        ((value / widths[path], widths[path]) for path, each in squares.items() for value in each
         if widths[path] <= budget), reverse=True
    )  # fmt: skip
    bound, left = 0.0, budget
    for worth, width in values:
        bound += worth * min(width, left)
        left -= min(width, left)
    assert kept_by(squares, ranks) <= bound + 1e-6


@settings(deadline=None)
@given(spectra, widths, st.floats(0.01, 1.0))
def test_a_share_is_reached_with_as_few_ranks_as_possible(
    squares: dict[str, list[float]], widths: dict[str, int], share: float
) -> None:
    ranks = ranks_for_share(squares, widths, share)
    whole = sum(map(sum, squares.values()))
    kept = kept_by(squares, ranks)
    assert kept >= share * whole - 1e-9 * whole
    for path, rank in ranks.items():
        if rank and squares[path][rank - 1] > 1e-9 * whole:
            assert kept - squares[path][rank - 1] < share * whole + 1e-9 * whole


def test_a_layer_that_loses_all_its_ranks_is_not_a_target(tmp_path: Path) -> None:
    folder, _ = of_peft(tmp_path / "own", "lora")
    compression = rw.compress_adapter(tmp_path / "cut", folder, parameters=40)
    left = {layer.path for layer in compression.layers if layer.rank}
    assert 0 < len(left) < len(compression.layers)
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == left
    peft.PeftModel.from_pretrained(Body(), tmp_path / "cut")


def test_an_adapter_on_a_model_is_compressed_like_its_folder(tmp_path: Path) -> None:
    model = rw.get_peft_model(
        Body(), rw.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=TARGETS)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.finalize_ranks()
    model.save_pretrained(tmp_path / "own")
    first = rw.compress_adapter(tmp_path / "first", model, rank=1)
    second = rw.compress_adapter(tmp_path / "second", tmp_path / "own", rank=1)
    assert first == second


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_reports_the_loss_and_writes_the_adapter(tmp_path: Path) -> None:
    folder, _ = of_peft(tmp_path / "own", "lora")
    code, out, err = run("compress", folder, "--rank", 2, "-o", tmp_path / "cut")
    assert (code, err) == (0, "")
    for layer in (*TARGETS, "conv"):
        assert layer in out
    assert "of the update's squared norm" in out
    code, out, _ = run("compress", folder, "--keep", 0.9, "-o", tmp_path / "cut", "--overwrite", "--json")
    assert code == 0 and json.loads(out)["lost"] <= 0.1


@pytest.mark.parametrize("width", [None, 60])
def test_tables_are_whole_in_a_pipe_and_in_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int | None
) -> None:
    folder, _ = of_peft(tmp_path / "own", "lora")
    monkeypatch.setenv("COLUMNS", str(width or 30))
    if width is not None:
        monkeypatch.setenv("FORCE_COLOR", "1")  # it makes rich treat its output as a terminal
    for words in (("--rank", 2, "-o", tmp_path / "cut"), ("--dry-run",)):
        code, out, err = run("compress", folder, *words)
        table = re.sub(r"\x1b\[[0-9;]*m", "", out).partition("\n\n")[0].splitlines()
        assert code == 0 and "…" not in out, (out, err)
        assert "lost" in table[0] and all("%" in line for line in table[1:])
        assert width is None or max(map(len, table)) <= width


def test_a_dry_run_is_a_curve_that_falls_and_writes_nothing(tmp_path: Path) -> None:
    folder, _ = of_peft(tmp_path / "own", "lora")
    code, out, _ = run("compress", folder, "--dry-run", "--json", "--parameters", 100)
    curve = json.loads(out)
    assert code == 0 and [each["lost"] for each in curve] == sorted(
        (each["lost"] for each in curve), reverse=True
    )
    assert curve[-1]["lost"] < 1e-12 and curve[0]["lost"] > 0.01
    assert run("compress", folder, "--dry-run")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_users_mistake_gives_a_message_and_exit_code_2_and_nothing_is_written(tmp_path: Path) -> None:
    folder, _ = of_peft(tmp_path / "own", "lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    goal = ("--rank", 1, "-o", tmp_path / "cut")
    for words, said in [
        ((tmp_path / "missing", *goal), "missing"),
        ((folder, "-o", tmp_path / "cut"), "--keep"),
        ((folder, "--rank", 1), "-o OUT"),
        ((folder, "--keep", 0.5, *goal), "one of"),
        ((folder, "--keep", 1.5, "-o", tmp_path / "cut"), "`keep`"),
        ((folder, "--rank", 0, "-o", tmp_path / "cut"), "`rank`"),
        ((folder, "--parameters", 5, "-o", tmp_path / "cut"), "too few"),
        ((folder, "--rank", 1, "-o", tmp_path / "full"), "--overwrite"),
    ]:
        code, out, err = run("compress", *words)
        assert code == 2 and said in err and "Traceback" not in err, (words, out, err)
    assert not (tmp_path / "cut").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_model_without_rankwises_layers_and_a_name_of_a_dtype_are_refused(tmp_path: Path) -> None:
    of_peft = peft.get_peft_model(Body(), peft.LoraConfig(target_modules=TARGETS))
    for model in (of_peft, Body()):
        for use in (
            lambda model: rw.compress_adapter(tmp_path / "out", model, rank=1),
            lambda model: rw.compression_curve(model),
            lambda model: rw.save_as_lora(tmp_path / "out", model),
            lambda model: rw.export_adapter(tmp_path / "out", model, "vllm"),
        ):
            with pytest.raises(
                TypeError, match=r"this is a .*save_pretrained\(folder\)`, and give the folder"
            ):
                use(model)
    own = rw.get_peft_model(Body(), rw.LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="must be floating point, such as torch.bfloat16, but is 'bfloat16'"):
        rw.save_as_lora(tmp_path / "out", own, dtype="bfloat16")  # type: ignore[arg-type]


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    model = rw.get_peft_model(Body(), rw.LoraConfig(r=2, target_modules=["wide"]))
    with pytest.raises(ValueError, match="changes nothing"):
        rw.compress_adapter(tmp_path / "cut", model, rank=1)


def test_factors_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    folder, _ = of_peft(tmp_path / "own", "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["r"] = 4
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="should have rank 4"):
        rw.compress_adapter(tmp_path / "cut", folder, rank=1)


def test_with_data_the_metric_is_measured_before_and_after(tmp_path: Path) -> None:
    world = save_tiny_model(tmp_path / "bert").parent
    write_table(world / "reviews.csv")
    write_table(world / "new.csv", 31, seed=4)
    train(load_recipe(write_recipe(world, world / "bert")), console=Console(file=StringIO()))
    words = ("compress", world / "out", "--keep", 0.5, "-o", tmp_path / "cut", "--data", world / "new.csv")
    code, out, err = run(*words, "--json")
    assert code == 0, err
    before, after = json.loads(out)["metrics"]
    for folder, metrics in ((world / "out", before), (tmp_path / "cut", after)):
        code, out, _ = run("evaluate", folder, world / "new.csv", "--json")
        assert code == 0 and json.loads(out)["metrics"] == metrics
    assert before != after
    assert not (tmp_path / "cut" / "results.json").exists()
    code, out, _ = run(*words, "--overwrite")
    assert code == 0 and "before" in out and "31 examples" in out
