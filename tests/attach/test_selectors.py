"""Warnings about every part of a configuration that selects nothing, on the basis of the modules selected."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rankwise import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from rankwise.attach.attachment import adapter_layers
from rankwise.attach.matching import matcher


def model() -> nn.Module:
    """Two blocks of an attention and an MLP, and a head."""

    def block() -> nn.Module:
        attention = nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8, bias=False)})
        return nn.ModuleDict({"attn": attention, "mlp": nn.Linear(8, 8)})

    return nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "head": nn.Linear(8, 2)})


def told(**fields: Any) -> list[str]:
    """The warnings when a model is adapted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model(), LoraConfig(r=2, **fields))
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(target_modules=["q", "vv"]), r"names 'vv'.*no such module"),
        (dict(target_modules=["q", "head"], modules_to_save=["head"]), None),
        (dict(target_modules=["q", "v"], exclude_modules=["v"]), "names 'v', but nothing .* `exclude_modules`"),
        (dict(target_modules="all-linear", exclude_modules=["haed"]), "'haed'.*Did you mean 'head'"),
        (dict(target_modules="all-linear", exclude_modules=["attn"]), "'layers.0.attn.q'.*Write an expression"),
        (dict(target_modules="all-linear", exclude_modules="attn"), "'attn', which matches no whole path"),
        (dict(target_modules=["q"], exclude_modules=r".*\.attn"), "but not the layers in it"),
        (dict(target_modules=["q"], layers_to_transform=[1, 7]), r"asks for layer 7.*from 0 to 1"),
        (dict(target_modules=["q"], layers_to_transform=[1], layers_pattern=["layers", "h"]), r"has 'h', in which"),
        (dict(target_modules=["q"], rank_pattern={"v": 4}), "`rank_pattern` has 'v', which matches no adapted layer"),
        (dict(target_modules=["q"], alpha_pattern={"qq": 4}), "`alpha_pattern` has 'qq'.*Did you mean 'q'"),
        (dict(target_modules=["q"], rank_pattern={"q": 4, "attn.q": 8}), "'attn.q', but another key comes first"),
        (dict(target_modules=["v"], bias="lora_only"), "`bias`='lora_only' trains no bias"),
    ],
)  # fmt: skip
def test_a_selector_that_selects_nothing_is_reported_with_the_reason(
    fields: dict[str, Any], said: str | None
) -> None:
    if said is None:  # all modules that the name matches train in full
        with pytest.raises(ValueError, match="in `modules_to_save`"):
            told(**fields)
        return
    messages = told(**fields)
    assert len(messages) == 1
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(messages[0])


@pytest.mark.parametrize(
    "fields",
    [
        dict(target_modules=["q", "mlp"], exclude_modules=["layers.0.mlp"]),
        dict(target_modules="all-linear", exclude_modules=r".*\.attn\..*"),
        dict(target_modules=["q"], exclude_modules=["head"]),  # no head is adapted, as requested
        dict(target_modules=["q"], layers_to_transform=[0, 1], layers_pattern="layers"),
        dict(target_modules=["q"], layers_to_transform=0),
        dict(target_modules=["q", "v"], rank_pattern={r"layers\.0.*": 4, "v": 8}, alpha_pattern={"q": 3}),
        dict(target_modules=["v"], bias="all"),
    ],
)
def test_selectors_that_all_select_something_are_passed_over_in_silence(fields: dict[str, Any]) -> None:
    assert told(**fields) == []


def test_in_any_combination_of_names_and_layers_idle_ones_are_reported() -> None:
    names = ["q", "layers.0.attn.v", "mlp", "head", "nothing"]
    for size, layers in itertools.product((1, 2, 3), (None, [0], [1, 7], [5])):
        for chosen in itertools.combinations(names, size):
            for excluded in ([], ["mlp"], ["attn", "q"]):
                fields = dict(
                    target_modules=list(chosen), exclude_modules=excluded, layers_to_transform=layers
                )
                adapted = model()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    try:
                        get_peft_model(adapted, LoraConfig(r=2, **fields))  # type: ignore[arg-type]
                    except ValueError:
                        continue  # nothing is adapted at all
                messages = [str(each.message) for each in caught]
                paths = list(adapter_layers(adapted))
                for name in chosen:
                    idle = not any(map(matcher([name]), paths))
                    assert any(f"`target_modules` names {name!r}" in each for each in messages) == idle
                for index in layers or ():
                    idle = not any(f"layers.{index}." in path for path in paths)
                    assert any(f"asks for layer {index}," in each for each in messages) == idle
                for name in excluded:
                    inside = any(f".{name}." in f".{path}." for path in paths)
                    assert any(f"`exclude_modules` names {name!r}" in each for each in messages) == inside


def test_the_warning_points_at_the_call() -> None:
    with pytest.warns(UserWarning, match="'vv'") as caught:
        get_peft_model(model(), LoraConfig(target_modules=["q", "vv"]))
    assert caught[0].filename == __file__


def test_the_rank_pattern_of_another_run_is_not_a_selector() -> None:
    with pytest.warns(UserWarning, match="result of another run") as caught:
        pattern = {"layers.0.attn.q.lora_E": [True] * 4}
        config = AdaLoraConfig(
            target_modules=["q"], init_r=4, target_r=2, total_step=100, rank_pattern=pattern
        )
        get_peft_model(model(), config)
    assert len(caught) == 1


def test_a_layer_with_two_names_is_told_when_it_is_adapted_and_when_an_adapter_is_loaded(
    tmp_path: Path,
) -> None:
    def twice() -> nn.Module:
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "c": nn.Linear(8, 2)})
        model["b"] = model["a"]
        return model

    with pytest.warns(UserWarning, match="'a' is also called 'b'.*PEFT"):
        model = get_peft_model(twice(), LoraConfig(target_modules=["a", "c"]))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'a' is also called 'b'"):
        PeftModel.from_pretrained(twice(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(twice(), LoraConfig(target_modules=["c"]))
