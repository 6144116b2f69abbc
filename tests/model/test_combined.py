"""`add_weighted_adapter`: sums of adapters that are exact, the best of a rank, or PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw


def layers() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 6),
            "up": nn.Linear(6, 9),
            "conv": nn.Conv2d(3, 4, 2),
            "head": nn.Linear(9, 2),
        }
    )


def lora(*targets: str, **fields: Any) -> rw.LoraConfig:
    return rw.LoraConfig(target_modules=list(targets), **{"r": 3, "init_lora_weights": False, **fields})


def model() -> Any:
    adapted = rw.get_peft_model(layers(), lora("embed", "up", "conv", lora_alpha=6), "a")
    adapted.add_adapter("b", lora("up", "conv", r=2, use_rslora=True))
    adapted.add_adapter("c", lora("up", "head"))
    adapted.add_adapter("d", rw.AdaLoraConfig(target_modules=["up"], init_r=4, target_r=2, total_step=50))
    with torch.no_grad():
        adapted["up"].lora_B["d"].normal_()
    return adapted


def expected(adapted: Any, path: str, weights: dict[str, float]) -> torch.Tensor:
    layer = adapted[path]
    return sum(
        (w * layer.delta_weight(name).double() for name, w in weights.items() if name in layer.lora_A),
        torch.zeros((), dtype=torch.float64),
    )


WEIGHTS = {"a": 0.7, "b": -1.5, "c": 2.0, "d": 0.3}


def test_cat_is_the_exact_sum_of_the_updates() -> None:
    adapted = model()
    adapted.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="cat")
    for path in ("embed", "up", "conv", "head"):
        assert torch.allclose(
            adapted[path].delta_weight("sum").double(), expected(adapted, path, WEIGHTS), atol=1e-5
        )
    assert adapted.active_adapters == ["a"] and adapted.peft_config["sum"].peft_type == "LORA"


@pytest.mark.parametrize("rank", [1, 2, 20, None])
def test_svd_is_the_best_approximation_of_its_rank(rank: int | None) -> None:
    adapted = model()
    adapted.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", svd_rank=rank)
    for path in ("embed", "up", "conv", "head"):
        whole = expected(adapted, path, WEIGHTS)
        S = torch.linalg.svdvals(whole.flatten(1))
        lost = (adapted[path].delta_weight("sum").double() - whole).square().sum()
        assert torch.allclose(lost, S[rank or 4 :].square().sum(), atol=1e-6)


def test_a_combination_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    adapted = model()
    adapted.add_weighted_adapter(["a", "c"], [1.0, 1.0], "sum", combination_type="cat")
    adapted.set_adapter("sum")
    assert all(p.requires_grad for p in adapted["up"].adapter_parameters("sum").values())
    x = torch.randn(5, 6)
    adapted.save_pretrained(tmp_path, selected_adapters=["sum"])
    fresh = rw.PeftModel.from_pretrained(layers(), tmp_path / "sum")
    assert torch.allclose(fresh["up"](x), adapted["up"](x), atol=1e-6)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(layers(), tmp_path / "sum")
    assert torch.allclose(theirs.base_model.model["up"](x), adapted["up"](x), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weights", [[0.5, 2.0], [1.0, -0.5], [0.0, 1.0]])
def test_combinations_are_pefts(kind: str, weights: list[float], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = rw.get_peft_model(layers(), lora("up", "conv", lora_alpha=6), "a")
    adapted.add_adapter("b", lora("up", "conv"))
    adapted.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(layers(), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=kind)
    adapted.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=kind)
    for path in ("up", "conv"):
        reference = theirs.base_model.model[path].get_delta_weight("sum")
        assert torch.allclose(adapted[path].delta_weight("sum"), reference, atol=1e-5)


def test_a_module_that_trains_whole_is_combined_if_only_one_adapter_has_it() -> None:
    adapted = rw.get_peft_model(layers(), lora("up", modules_to_save=["head"]), "a")
    adapted.add_adapter("b", lora("up"))
    with torch.no_grad():
        adapted["head"].modules_to_save["a"].weight.add_(1)
    adapted.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    held = adapted["head"].modules_to_save
    assert torch.equal(held["sum"].weight, held["a"].weight) and held["sum"] is not held["a"]
    adapted.add_adapter("c", lora("up", modules_to_save=["head"]))
    with pytest.raises(
        ValueError, match=r"\['a', 'c'\] can't be combined: each has a copy of 'head'.*at most one"
    ):
        adapted.add_weighted_adapter(["a", "c"], [1.0, 1.0], "both")
    assert "both" not in adapted.peft_config


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "said"),
    [
        (
            (["a", "b"], [1.0, 1.0], "s"),
            dict(combination_type="ties"),
            ValueError,
            "is not offered: use one of svd",
        ),
        ((["a", "b"], [1.0, 1.0], "s"), dict(combination_type="vsd"), ValueError, "Did you mean 'svd'"),
        (
            (["a", "b"], [1.0, 1.0], "s"),
            dict(combination_type="linear"),
            ValueError,
            "one rank, but theirs are",
        ),
        ((["a", "b"], [1.0, 1.0], "s"), dict(svd_clamp=0.5), ValueError, "`svd_clamp` is not offered"),
        ((["a", "b"], [1.0, 1.0], "s"), dict(svd_rnk=3), TypeError, "no argument 'svd_rnk'"),
        ((["a", "b"], [1.0, 1.0], "s"), dict(svd_rank=0), ValueError, "at least 1"),
        ((["a", "b"], [1.0], "s"), {}, ValueError, "lists of one length"),
        ((["a", "b"], [1.0, float("nan")], "s"), {}, ValueError, "must be finite"),
        ((["a", "a"], [1.0, 1.0], "s"), {}, ValueError, "names one twice"),
        ((["a", "z"], [1.0, 1.0], "s"), {}, ValueError, "no adapter 'z'"),
        ((["a", "b"], [1.0, 1.0], "c"), {}, ValueError, "an adapter 'c' already"),
    ],
)
def test_adapters_that_cannot_be_combined_are_refused(
    arguments: Any, options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    adapted = model()
    with pytest.raises(kind, match=said):
        adapted.add_weighted_adapter(*arguments, **options)
    assert sorted(adapted.peft_config) == ["a", "b", "c", "d"]
