"""Probes of a model against its own full gradients, on float64, bfloat16 and quantized bases; and rank plans."""

from __future__ import annotations

import copy
import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import rankwise as rw
from rankwise.attach.attachment import adapter_layers
from rankwise.cli import app
from rankwise.recipes import RecipeError, load_recipe, plan, train
from recipe_world import save_tiny_model, write_recipe, write_table
from tiny import llama, token_batches


def full_gradients(model: nn.Module, batches: Any, paths: Any) -> dict[str, torch.Tensor]:
    """The averaged gradients of whole weights, computed by autograd."""
    model = copy.deepcopy(model).requires_grad_(True)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    return {path: model.get_submodule(path).weight.grad for path in paths}


LINEAR = rw.LoraConfig(target_modules="all-linear")


@pytest.mark.parametrize("max_rank", [2, 32])
def test_spectra_are_those_of_the_full_gradient_in_float64(max_rank: int) -> None:
    model = llama(hidden_size=64, intermediate_size=96).double()
    batches = list(token_batches(4, size=4))
    found = rw.probe(model, batches, LINEAR, max_rank=max_rank)
    truth = full_gradients(model, batches, [layer.path for layer in found.layers])
    assert len(found.layers) == 14 and not found.left_out
    for layer in found.layers:
        exact = torch.linalg.svdvals(truth[layer.path])
        mine = torch.tensor(layer.singular_values, dtype=torch.float64)
        assert layer.exact == (max_rank == 32)
        assert torch.allclose(mine, exact[: len(mine)], rtol=1e-9 if layer.exact else 0.1)
        assert layer.square == pytest.approx(float(exact.square().sum()), rel=1e-9 if layer.exact else 0.6)


def test_the_model_is_as_before_and_no_gradient_is_left() -> None:
    model = llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    state = torch.get_rng_state()
    rw.probe(model, token_batches(2, size=2), LINEAR)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_gradient_checkpointing_gives_the_same_spectra() -> None:
    model, batches = llama().train(), list(token_batches(3, size=2))
    plain = rw.probe(model, batches, LINEAR)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = rw.probe(model, batches, LINEAR)
    for one, other in zip(plain.layers, again.layers, strict=True):
        assert one.singular_values == pytest.approx(other.singular_values, rel=1e-4, abs=1e-7)


def test_a_bfloat16_base_has_nearly_the_same_spectra() -> None:
    model, batches = llama(), list(token_batches(3, size=4))
    exact = rw.probe(model, batches, LINEAR)
    rough = rw.probe(copy.deepcopy(model).bfloat16(), batches, LINEAR)
    for one, other in zip(exact.layers, rough.layers, strict=True):
        assert one.singular_values[0] == pytest.approx(other.singular_values[0], rel=0.05)


def test_a_base_in_four_bits_is_probed_as_it_is() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = llama()
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            packed = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, bias=False)
            packed.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False)
            model.set_submodule(name, packed.to("cpu"))
    batches = list(token_batches(2, size=4))
    found = rw.probe(model, batches, LINEAR)
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if name.endswith("_proj"):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = nn.Linear(*weight.shape[::-1], bias=False)
            plain.weight.data.copy_(weight)
            dense.set_submodule(name, plain)
    truth = full_gradients(dense, batches, [layer.path for layer in found.layers])
    for layer in found.layers:
        exact = torch.linalg.svdvals(truth[layer.path])
        assert layer.singular_values[0] == pytest.approx(float(exact[0]), rel=0.02)


def test_layers_called_twice_or_never_and_transposed_ones() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.ModuleDict({"twice": nn.Linear(6, 6), "never": nn.Linear(6, 6), "turned": Conv1D(4, 6)})
    x = torch.randn(5, 6)

    def loss(model: Any, x: torch.Tensor) -> torch.Tensor:
        return model["turned"](model["twice"](model["twice"](x).tanh())).square().mean()

    config = rw.LoraConfig(target_modules=["twice", "never", "turned"])
    found = rw.probe(model, [x], config, loss=loss)
    loss(model, x).backward()
    by_path = {layer.path: layer for layer in found.layers}
    assert by_path["never"].square == 0 and found.plan(keep=1.0).ranks["never"] == 0
    for path in ("twice", "turned"):
        exact = torch.linalg.svdvals(model[path].weight.grad)
        assert torch.allclose(torch.tensor(by_path[path].singular_values), exact, atol=1e-6)
    assert (by_path["turned"].d_out, by_path["turned"].d_in) == (4, 6)


# --- plans -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> rw.Probe:
    return rw.probe(llama(), token_batches(3, size=4), LINEAR, max_rank=8)


def test_a_plan_meets_its_budget_and_more_budget_holds_more(found: rw.Probe) -> None:
    one = found.plan(parameters=2000)
    assert 1900 < one.parameters <= 2000
    assert found.plan(bytes=8000).ranks == one.ranks == found.plan(bytes=4000, bytes_per_parameter=2).ranks
    widths = sum(layer.width for layer in found.layers)
    assert found.plan(rank=1).parameters <= widths < found.plan(rank=2).parameters
    assert found.plan(rank=4).kept > found.plan(rank=2).kept > found.plan(rank=1).kept
    kept = found.plan(keep=0.5)
    assert kept.kept >= 0.5 and found.plan(parameters=kept.parameters - 40).kept < kept.kept


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({}, "Give one of"),
        ({"rank": 1, "keep": 0.5}, "Give one of"),
        ({"parameters": 3}, "are too few: one rank takes from"),
        ({"keep": 1.5}, "at most 1"),
        ({"rank": 0}, "greater than 0"),
        ({"keep": 1.0}, "Probe with a greater `max_rank`, or keep less"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(goal: dict[str, Any], said: str) -> None:
    layers = [rw.LayerSpectrum("q", 8, 8, [2.0, 1.0], 9.0, False)]
    with pytest.raises(ValueError, match=said):
        rw.Probe(layers, 1).plan(**goal)


def test_lora_trains_with_a_plan_at_one_scale(found: rw.Probe) -> None:
    planned = found.plan(rank=2)
    model = rw.get_peft_model(llama(), planned.lora_config(lora_alpha=4))
    ranks = {layer.path: layer.rank for layer in model.rank_summary().layers}
    assert ranks == planned.rank_pattern and model.rank_summary().parameters == planned.parameters
    scales = {layer.scaling["default"] for layer in adapter_layers(model).values()}
    assert scales == {4 / planned.mean_rank}


def test_models_that_cannot_be_probed_are_refused() -> None:
    batches = list(token_batches(1, size=2))
    with pytest.raises(ValueError, match="Call it before `get_peft_model`"):
        rw.probe(rw.get_peft_model(llama(), rw.LoraConfig(target_modules=["q_proj"])), batches)
    with pytest.raises(ValueError, match="`batches` is empty"):
        rw.probe(llama(), [])
    with pytest.raises(TypeError, match="gives no loss"):
        rw.probe(llama(), [{"input_ids": batches[0]["input_ids"]}])
    with pytest.raises(ValueError, match="not finite"):
        rw.probe(llama(), batches, loss=lambda model, batch: model(**batch).loss * float("nan"))
    with pytest.raises(ValueError, match="No gradient reaches"):
        rw.probe(llama(), batches, loss=lambda model, batch: model(**batch).loss * 0)


# --- recipes -----------------------------------------------------------------------------------------------------


def test_a_recipe_is_probed_and_trains_with_its_plan(tmp_path: Path) -> None:
    write_table(tmp_path / "reviews.csv")
    recipe = write_recipe(tmp_path, save_tiny_model(tmp_path / "bert"))
    file = tmp_path / "plan.yaml"
    result = CliRunner().invoke(
        app, ["probe", str(recipe), "--rank", "1.5", "--batches", "3", "-o", str(file)]
    )
    assert result.exit_code == 0, result.stderr
    assert "effective rank" in result.stdout and "% of the gradient" in result.stdout
    planned = rw.RankPlan.load(file)
    assert 0 < planned.parameters <= 1.5 * sum(planned.widths.values())
    taken = CliRunner().invoke(app, ["probe", str(recipe), "-o", str(file)])
    assert taken.exit_code == 2 and "--overwrite" in taken.stderr
    with_plan = [f"adapter.plan={file}", "~adapter.target_r"]
    lora = [*with_plan, "adapter.method=lora", "~adapter.init_r", "~schedule"]
    done = train(load_recipe(recipe, lora), console=Console(file=StringIO()))
    ranks = {layer["path"]: layer["rank"] for layer in results(done.folder)["ranks"]["layers"]}
    assert ranks == planned.rank_pattern
    adaptive = plan(load_recipe(recipe, [*with_plan, "adapter.init_r=3", f"output={tmp_path / 'two'}"]))
    assert adaptive.layers == len(planned.target_modules) and adaptive.initial == 3 * adaptive.layers
    console = Console(file=StringIO(), width=200)
    console.print(adaptive, plan(load_recipe(recipe, [*lora, f"output={tmp_path / 'two'}"])))
    said = re.findall(r"LoRA on \d+ layers, (.*?);", console.file.getvalue())
    assert len(said) == 2 and not any(re.search(r"\.\d\d", each) for each in said), said
    with pytest.raises(RecipeError, match="rank_pattern: is given by `plan`"):
        load_recipe(recipe, [*lora, "adapter.rank_pattern={query: 3}"])
    file.write_text("layers: {a: {rank: -1, width: 3}}")
    with pytest.raises(RecipeError, match=r"`layers.a.rank` must be a whole number of at least 0, but is -1"):
        plan(load_recipe(recipe, [*lora, f"output={tmp_path / 'three'}"]))


def results(folder: Path) -> dict[str, Any]:
    import json

    return dict(json.loads((folder / "results.json").read_text()))


def scaled_loss(by: float) -> Any:
    return lambda model, batch: model(**batch).loss * by


@pytest.mark.parametrize("max_rank", [2, 32])
@pytest.mark.parametrize("by", [1e-25, 1e-30, 1e15, 1e19])
def test_finite_gradients_of_any_size_give_the_same_plan(by: float, max_rank: int) -> None:
    batches = list(token_batches(3, size=2))
    model = llama()
    plain = rw.probe(model, batches, LINEAR, max_rank=max_rank)
    found = rw.probe(model, batches, LINEAR, max_rank=max_rank, loss=scaled_loss(by))
    for mine, usual in zip(found.layers, plain.layers, strict=True):
        assert mine.square == pytest.approx(usual.square * by**2, rel=1e-3)
        most = usual.singular_values[0]
        assert [each / by for each in mine.singular_values] == pytest.approx(
            usual.singular_values, rel=1e-3, abs=1e-4 * most
        )
    assert found.plan(rank=1).ranks == plain.plan(rank=1).ranks
    assert found.plan(keep=0.2).kept == pytest.approx(plain.plan(keep=0.2).kept, rel=1e-2)
    assert f"{math.sqrt(found.layers[0].square):.3g}" in found.table()


def test_a_loss_that_is_not_finite_in_the_second_pass_only_is_refused_by_name() -> None:
    calls = []

    def loss(model: Any, batch: Any) -> Any:
        calls.append(batch)
        return model(**batch).loss * (float("nan") if len(calls) > 3 else 1.0)

    with pytest.raises(ValueError, match=r"gradient of 'model\.layers.* is not finite"):
        rw.probe(llama(), token_batches(3, size=2), LINEAR, max_rank=1, loss=loss)
    assert len(calls) > 3


@pytest.mark.parametrize("by", [1e-200, 1e200])
def test_gradients_whose_squares_overflow_are_refused_with_their_norm(by: float) -> None:
    batches = [torch.ones(2, 5, dtype=torch.float64)]
    config = rw.LoraConfig(target_modules=["0"])
    with pytest.raises(
        ValueError, match=r"has the norm .*e[-+]\d+, whose square does not fit.*Multiply the loss"
    ):
        rw.probe(nn.Sequential(nn.Linear(5, 3).double()), batches, config, loss=lambda m, x: m(x).sum() * by)
