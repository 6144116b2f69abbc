"""The model keeps its object, class, names and attributes. Anything but a model and a configuration is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from block_world import TOKENS, Block, X, adalora, assert_same, block, lora, snapshot, train
from rankwise.adapters import AdapterLayer
from rankwise.attach import attachment as attach
from tiny import bert, llama, token_batches


def test_the_model_stays_the_same_object_of_its_own_class() -> None:
    from transformers import LlamaForCausalLM, PreTrainedModel

    base = llama()
    model = rw.get_peft_model(base, adalora(target_modules=["q_proj"]))
    assert (
        model is base
        and isinstance(model, (LlamaForCausalLM, PreTrainedModel))
        and isinstance(model, rw.PeftModel)
    )
    assert (
        type(model).__name__ == "LlamaForCausalLM" and type(model).__module__ == LlamaForCausalLM.__module__
    )
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear"
    assert model.get_base_model() is model


def test_generate_works_and_follows_the_adapter() -> None:
    model = llama(initializer_range=0.3).eval()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(TOKENS, **options)
    rw.get_peft_model(model, lora(target_modules="all-linear", lora_alpha=20)).eval()
    adapted = model.generate(TOKENS, **options)
    assert adapted.shape == plain.shape and not torch.equal(adapted, plain)
    with model.disable_adapter():
        assert torch.equal(model.generate(TOKENS, **options), plain)
    assert torch.equal(model.merge_and_unload().generate(TOKENS, **options), adapted)


@pytest.mark.parametrize("config", [lora(), adalora(), lora(modules_to_save=["head"]), lora(bias="all")],
                         ids=["lora", "adalora", "head", "bias"])  # fmt: skip
def test_unload_restores_classes_parameters_and_names(config: rw.LoraConfig) -> None:
    model = block()
    before, parameters = snapshot(model), list(model.parameters())
    rw.get_peft_model(model, config)
    model(X)
    assert model.unload() is model
    model.requires_grad_(True)  # parameters stay frozen, as in PEFT
    assert_same(before, snapshot(model))
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_a_transformers_model_is_restored_as_well() -> None:
    model = bert()
    before = snapshot(model)
    rw.get_peft_model(model, adalora(target_modules=["query"], task_type="SEQ_CLS")).unload()
    model.requires_grad_(True)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("steps", [0, 5, 12])
def test_copies_compute_the_same_and_train_on_their_own(way: str, steps: int, tmp_path: Path) -> None:
    model = rw.get_peft_model(block(), adalora(target_r=1, modules_to_save=["head"]))
    train(model, steps)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert other is not model and type(other) is type(model) and torch.equal(other(X), model(X))
    assert isinstance(other, Block) and type(other.body.first) is type(model.body.first)
    assert other.allocation_state == model.allocation_state
    before, ranks = model(X), [row.rank for row in model.rank_summary().layers]
    train(other, 12 - steps or 1, seed=9)
    assert torch.equal(model(X), before) and [row.rank for row in model.rank_summary().layers] == ranks
    assert model.allocation_state.step == steps and other.allocation_state.step == max(12, steps + 1)
    assert sum(row.rank for row in other.rank_summary().layers) == 2
    records = other.rank_history.records
    assert records[-1].budget == 2 and (steps == 12 or len(records) > len(model.rank_history.records))
    other.update_and_allocate  # bound to the copy  # noqa: B018
    assert other.unload() is other and type(other) is Block


def test_a_pickle_of_an_earlier_version_trains_deletes_and_unloads() -> None:
    """Earlier versions did not note which scales have changed."""
    model = rw.get_peft_model(block(), adalora(target_r=1))
    del model.body.first.changed_scale
    other = pickle.loads(pickle.dumps(model))
    train(other, 12)
    assert float(other.body.first.changed_scale["default"]) == pytest.approx(
        other.body.first.scaling["default"]
    )
    other.add_adapter("other", rw.LoraConfig(r=2, target_modules=["first"]))
    other.delete_adapter("other")
    assert type(other.unload()) is Block


def test_a_copied_transformers_model_finds_its_own_controller() -> None:
    model = rw.get_peft_model(llama(), adalora(target_modules=["q_proj", "v_proj"]))
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    batch = token_batches(1)[0]
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, 4):
        other(**batch).loss.backward()
        optimizer.step()
        other.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert other.allocation_state.step == 3 and model.allocation_state.step == 0
    assert not any("grad" in key for key in model.state_dict()) and model.lm_head.weight.grad is None


@pytest.mark.parametrize("make", [block, llama])
def test_base_model_takes_update_and_allocate(make: Any) -> None:
    targets = ["second"] if make is block else ["q_proj"]
    model = rw.get_peft_model(make(), adalora(target_modules=targets))
    assert isinstance(model.base_model, nn.Module)
    model.base_model.update_and_allocate(1)
    assert model.allocation_state.step == 1
    if make is llama:
        assert model.base_model is model.model
        model.unload()
        assert not hasattr(model.model, "update_and_allocate")


class Occupied(nn.Module):
    """A user's model whose own attributes have rankwise's names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "module":
            self.base_model: Any = nn.Linear(6, 6)
        elif kind == "text":
            self.base_model = "some/base"
        self.kind, self.inner = kind, nn.Linear(6, 3)
        self.lora_A = nn.Linear(6, 6)
        self.scaling = 3.0

    @property
    def described(self) -> str:
        return f"{self.base_model}"

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "text":
            assert self.base_model == "some/base"
        return self.inner(self.lora_A(self.base_model(x) if self.kind == "module" else x)) * self.scaling


@pytest.mark.parametrize("kind", ["module", "text"])
def test_a_users_own_attributes_with_rankwises_names_are_kept(kind: str) -> None:
    model = Occupied(kind)
    before = snapshot(model)
    expected, own, described = model(X), model.base_model, model.described
    targets = ["inner", "lora_A"] + (["base_model"] if kind == "module" else [])
    rw.get_peft_model(model, adalora(target_modules=targets))
    assert torch.equal(model(X), expected) and model.base_model is own and model.scaling == 3.0
    if kind == "text":
        assert model.described == described
    train(model, 12)
    assert model.allocation_state.reached_target
    moved = model(X)
    assert not torch.equal(moved, expected)
    torch.testing.assert_close(model.merge_and_unload()(X), moved, atol=1e-4, rtol=1e-4)
    assert (
        before["state"].keys() == model.state_dict().keys()
        and before["classes"] == snapshot(model)["classes"]
    )


def test_sequential_models_keep_indexing_and_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    base = copy.deepcopy(model)
    rw.get_peft_model(model, lora(target_modules=["0", "2"]))
    assert len(model) == 3 and isinstance(model[0], nn.Linear) and list(model)[2] is model[2]
    assert isinstance(model[:2], nn.Sequential)
    model.save_pretrained(tmp_path)
    assert torch.equal(rw.PeftModel.from_pretrained(base, tmp_path)(X), model(X))


def test_one_adapted_layer_alone_is_refused_with_a_reason() -> None:
    layer = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="target_modules"):
        rw.get_peft_model(layer, lora())
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_counts_are_pefts(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    if kind == "adalora":
        options |= {"init_r": 4, "target_r": 2, "total_step": 12}
    names = {"lora": "LoraConfig", "adalora": "AdaLoraConfig"}
    options["init_lora_weights"] = True
    ours, theirs = (
        library.get_peft_model(bert(), getattr(library, names[kind])(**options)) for library in (rw, peft)
    )
    counters = 4 if kind == "adalora" else 0  # for each layer, PEFT's AdaLoRA counts one number more
    trained, total = theirs.get_nb_trainable_parameters()
    assert ours.get_nb_trainable_parameters() == (trained, total - counters)
    if kind == "lora":
        theirs.print_trainable_parameters()
        ours.print_trainable_parameters()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == lines[1] and lines[0].startswith("trainable params: ")


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["nothing"]},
        {"target_modules": ["first", "relu"]},
        {"target_modules": ["first"], "modules_to_save": ["nothing"]},
        {"target_modules": ["body"]},
        {"target_modules": None},
    ],
    ids=["no-match", "not-adaptable", "no-head", "container", "no-defaults"],
)
def test_a_configuration_that_does_not_fit_leaves_the_model_as_it_was(
    options: dict[str, Any], adapted: bool
) -> None:
    model = block()
    if adapted:
        rw.get_peft_model(model, lora())
        model.head.weight.requires_grad_(True)
    expected, before = model(X), snapshot(model)
    for config in (rw.LoraConfig(**options), rw.AdaLoraConfig(total_step=9, **options)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError):
                rw.get_peft_model(model, config, adapter_name="new")
        assert_same(before, snapshot(model))
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("where", ["second layer", "head", "controller"])
def test_a_failure_half_way_leaves_the_model_as_it_was(
    where: str, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out, for example."""
    model = block()
    if adapted:
        rw.get_peft_model(model, lora(target_modules=["second"]))
    model.head.weight.requires_grad_(True)
    expected, before = model(X), snapshot(model)
    original, calls = AdapterLayer.add_adapter, []

    def add_adapter(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("mine")
        original(self, *args)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("mine")

    if where == "second layer":
        monkeypatch.setattr(AdapterLayer, "add_adapter", add_adapter)
    elif where == "head":
        monkeypatch.setattr(attach, "prepare_saved_module", fail)
    else:
        monkeypatch.setattr("rankwise.model.named.own_controller", fail)
    with pytest.raises(torch.OutOfMemoryError, match="mine"):
        rw.get_peft_model(model, adalora(modules_to_save=["head"]), adapter_name="new")
    assert_same(before, snapshot(model))
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("wrong", [None, "text", 3])
def test_anything_but_a_model_and_a_configuration_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        rw.get_peft_model(wrong, lora())
    with pytest.raises(TypeError, match="LoraConfig"):
        rw.get_peft_model(block(), wrong)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        rw.PeftModel.from_pretrained(wrong, "somewhere")


def test_a_model_or_configuration_of_peft_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(target_modules=["first"])
    with pytest.raises(TypeError, match="of another library. Import it from rankwise"):
        rw.get_peft_model(block(), theirs)
    with pytest.raises(ValueError, match="PEFT"):
        rw.get_peft_model(peft.get_peft_model(block(), theirs), lora())


def test_layers_with_accelerates_hooks_are_adapted() -> None:
    """In a model that is spread over several devices, each layer object's forward function is replaced."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, seen = block(), []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    for layer in (model.body.first, model.head):
        hooks.add_hook_to_module(layer, Hook())
    expected = model(X)
    rw.get_peft_model(model, lora(target_modules=["first"], modules_to_save=["head"]))
    with torch.no_grad():
        model.head.modules_to_save["default"].bias.add_(1.0)
    seen.clear()
    adapted = model(X)
    assert (adapted - expected).abs().max() > 0.5 and len(seen) >= 2
    hooks.add_hook_to_module(model.body.first, Hook(), append=True)
    assert torch.equal(model(X), adapted)
    hooks.remove_hook_from_module(model.body.first)
    assert torch.equal(model(X), adapted)
    hooks.add_hook_to_module(model.body.second, Hook())
    model.unload()
    assert torch.equal(model(X), expected)


def test_a_layer_whose_forward_was_replaced_by_hand_is_refused() -> None:
    model = block()
    model.body.second.forward = lambda x: x[:, :6]
    before = snapshot(model)
    for options in ({}, {"target_modules": ["first"], "modules_to_save": ["second"]}):
        with pytest.raises(ValueError, match=r"'body\.second'.*forward"):
            rw.get_peft_model(model, lora(**options))
        assert_same(before, snapshot(model))
