"""What an adapted model can do: adapters by name, merging, copies, and that a failure leaves the model as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise import storage
from rankwise.adapters import AdapterLayer
from rankwise.attach import attachment as attach
from tiny import bert, llama, token_batches

TOKENS = torch.arange(24).reshape(2, 12) * 5 % 64


class Block(nn.Module):
    """A user's model; nested, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict(first=nn.Linear(6, 8), relu=nn.ReLU(), second=nn.Linear(8, 6)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def _block(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Block()


def _lora(**changes: Any) -> rw.LoraConfig:
    return rw.LoraConfig(
        **{"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False, **changes}
    )


def _adalora(**changes: Any) -> rw.AdaLoraConfig:
    schedule = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 12, "lora_alpha": 16}
    return rw.AdaLoraConfig(**{**schedule, "target_modules": ["first", "second"], **changes})


def _two_adapters() -> tuple[Any, dict[str, Tensor]]:
    """A block with adapters "default" and "other", and the outputs of each and of the base."""
    model = _block()
    outputs = {"base": model(X)}
    rw.get_peft_model(model, _lora())
    outputs["default"] = model(X)
    model.add_adapter("other", _lora(target_modules=["second"], r=3))
    assert torch.equal(model(X), outputs["default"]), "an added adapter does not act by itself"
    model.set_adapter("other")
    outputs["other"] = model(X)
    model.set_adapter("default")
    assert len({float(output.detach().sum()) for output in outputs.values()}) == 3
    return model, outputs


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that a failure could change."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "state": {
            key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)
        },
        "grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": [module.training for module in model.modules()],
    }


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in before["state"])
    for part in ("classes", "attributes", "hooks", "grad", "training"):
        assert before[part] == after[part], part


def _train(model: Any, steps: int, lr: float = 0.1, seed: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator)
        (model(x) - x[:, :3].flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# The model stays itself.


def test_the_model_stays_the_same_object_of_its_own_class() -> None:
    from transformers import LlamaForCausalLM, PreTrainedModel

    base = llama()
    model = rw.get_peft_model(base, _adalora(target_modules=["q_proj"]))
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
    rw.get_peft_model(model, _lora(target_modules="all-linear", lora_alpha=20)).eval()
    adapted = model.generate(TOKENS, **options)
    assert adapted.shape == plain.shape and not torch.equal(adapted, plain)
    with model.disable_adapter():
        assert torch.equal(model.generate(TOKENS, **options), plain)
    assert torch.equal(model.merge_and_unload().generate(TOKENS, **options), adapted)


@pytest.mark.parametrize("config", [_lora(), _adalora(), _lora(modules_to_save=["head"]), _lora(bias="all")],
                         ids=["lora", "adalora", "head", "bias"])  # fmt: skip
def test_unload_restores_classes_parameters_and_names(config: rw.LoraConfig) -> None:
    model = _block()
    before, parameters = _snapshot(model), list(model.parameters())
    rw.get_peft_model(model, config)
    model(X)
    assert model.unload() is model
    model.requires_grad_(True)  # freezing stays, as in PEFT
    _assert_same(before, _snapshot(model))
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_a_transformers_model_is_restored_as_well() -> None:
    model = bert()
    before = _snapshot(model)
    rw.get_peft_model(model, _adalora(target_modules=["query"], task_type="SEQ_CLS")).unload()
    model.requires_grad_(True)
    _assert_same(before, _snapshot(model))


def test_merge_and_unload_returns_the_plain_model_with_the_adapters_output() -> None:
    model = rw.get_peft_model(_block(), _lora(modules_to_save=["head"]))
    with torch.no_grad():
        model.head.modules_to_save["default"].weight.add_(1.0)
    expected = model(X)
    assert model.merge_and_unload() is model
    assert type(model) is Block and type(model.body.first) is nn.Linear and type(model.head) is nn.Linear
    assert model.state_dict().keys() == _block().state_dict().keys()
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(model, "peft_config")
    rw.get_peft_model(model, _adalora())
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)


# Adapters by name.


def test_both_orders_of_arguments_add_an_adapter() -> None:
    model = rw.get_peft_model(_block(), _lora())
    model.add_adapter("peft", _lora())
    model.add_adapter(_lora(), "transformers")
    model.add_adapter(adapter_name="named", peft_config=_lora())
    assert list(model.peft_config) == ["default", "peft", "transformers", "named"]
    assert model.active_adapters == ["default"] and model.active_adapter == "default"
    for wrong in ((3, _lora()), ("text", "text"), (_lora(), _lora())):
        with pytest.raises(TypeError, match="name and a"):
            model.add_adapter(*wrong)


@pytest.mark.parametrize("name", ["", "with.dot", "keys", "default"])
def test_names_that_cannot_be_or_are_taken_are_refused(name: str) -> None:
    model = rw.get_peft_model(_block(), _lora())
    before = _snapshot(model)
    with pytest.raises(ValueError, match="can't name|already"):
        model.add_adapter(name, _lora())
    _assert_same(before, _snapshot(model))


def test_one_adapter_or_several_act() -> None:
    model, outputs = _two_adapters()
    hidden = model.body.relu(model.body.first(X))
    other = model.body.second.delta_weight("other")
    for names in (["default", "other"], ["other", "default"], ["default", "other", "default"]):
        model.set_adapter(names)
        assert model.active_adapters == list(dict.fromkeys(names))
        expected = model.head(model.body.second(hidden))
        torch.testing.assert_close(model(X), expected)
    model.set_adapter("default")
    both = model.head(model.body.second(hidden) + hidden @ other.T)
    model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(X), both)
    for name in ("other", "default"):
        model.set_adapter(name)
        assert torch.equal(model(X), outputs[name]) and model.active_adapters == [name]
    with pytest.raises(ValueError, match="no adapter 'third'.*default"):
        model.set_adapter("third")


def test_only_the_acting_adapter_trains() -> None:
    model, _ = _two_adapters()

    def trains() -> set[str]:
        return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}

    assert trains() == {"default"}
    model.set_adapter("other")
    assert trains() == {"other"}
    model.set_adapter(["other", "default"])
    assert trains() == {"other", "default"}
    model.set_adapter("other", inference_mode=True)
    assert trains() == set()


def test_adding_an_adapter_leaves_what_trains_as_it_is() -> None:
    model = rw.get_peft_model(_block(), _lora(target_modules=["second"]))
    model.head.weight.requires_grad_(True)
    model.body.second.lora_A["default"].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_adapter("other", _lora(target_modules=["first", "second"]))
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before.keys())
    assert torch.equal(model.body.first(X), nn.Linear.forward(model.body.first, X))


def test_copies_of_a_module_follow_the_acting_adapter() -> None:
    model = rw.get_peft_model(_block(), _lora(modules_to_save=["head"]))
    model.add_adapter("other", _lora(modules_to_save=["head"]))
    model.add_adapter("plain", _lora())
    with torch.no_grad():
        model.head.modules_to_save["default"].bias.fill_(5.0)
        model.head.modules_to_save["other"].bias.fill_(-5.0)
    for name, sign in (("default", 1), ("other", -1)):
        model.set_adapter(name)
        assert (model.head(X) * sign > 0).all()
        assert model.head.modules_to_save[name].weight.requires_grad
        assert not dict(model.named_parameters())["head.weight"].requires_grad
    model.set_adapter("plain")
    assert torch.equal(model.head(X), _block().head(X))
    model.set_adapter(["plain", "other"])
    assert (model.head(X) < 0).all()
    before = model.active_adapters
    with pytest.raises(ValueError, match="'head'"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == before
    model.set_adapter("default")
    with model.disable_adapter():
        assert torch.equal(model(X), _block()(X))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_modules": ["head", "first"]}, {"modules_to_save": ["head"]}),
        ({"modules_to_save": ["head"]}, {"target_modules": ["head", "first"]}),
        ({"target_modules": ["head"], "modules_to_save": ["body"]}, {"target_modules": ["first"]}),
        ({"target_modules": ["first"]}, {"target_modules": ["head"], "modules_to_save": ["body"]}),
        ({"target_modules": ["head"], "modules_to_save": ["first"]},
         {"target_modules": ["head"], "modules_to_save": ["body"]}),
    ],
    ids=["adapted-then-saved", "saved-then-adapted", "adapted-inside", "saved-around", "nested"],
)  # fmt: skip
def test_adapters_that_treat_a_module_differently_are_refused(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    rw.get_peft_model(_block(), _lora(**second)).save_pretrained(tmp_path)
    model = rw.get_peft_model(_block(), _lora(**first))
    before, expected = _snapshot(model), model(X)
    with pytest.raises(ValueError, match="'second'.*modules_to_save"):
        model.add_adapter("second", _lora(**second))
    with pytest.raises(ValueError):
        model.load_adapter(tmp_path, "second")
    _assert_same(before, _snapshot(model))
    assert torch.equal(model(X), expected)


def test_disabling_nests_and_survives_exceptions() -> None:
    model, outputs = _two_adapters()
    with model.disable_adapter():
        assert torch.equal(model(X), outputs["base"])
        with model.disable_adapter():
            assert torch.equal(model(X), outputs["base"])
        assert torch.equal(model(X), outputs["base"]), "the inner context must not enable again"
        model.add_adapter("third", _lora(target_modules=["first", "head"]))
        assert torch.equal(model(X), outputs["base"]), "nor must a new adapter"
    assert torch.equal(model(X), outputs["default"])
    with pytest.raises(RuntimeError, match="mine"), model.disable_adapter():
        raise RuntimeError("mine")
    assert torch.equal(model(X), outputs["default"])
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(model(X), outputs["base"]), "what was off before the context is off after it"
    model.enable_adapter_layers()
    assert torch.equal(model(X), outputs["default"])


def test_biases_belong_to_one_adapter_and_it_is_said_that_they_stay() -> None:
    model = rw.get_peft_model(_block(), _lora(bias="all"))
    assert model.head.bias.requires_grad
    model.add_adapter("other", _lora())
    with pytest.raises(ValueError, match="'default'.*bias"):
        model.add_adapter("third", _lora(bias="lora_only"))
    assert list(model.peft_config) == ["default", "other"]
    model.set_adapter("other")
    assert not model.head.bias.requires_grad, "the biases are those of an adapter that does not act"
    model.set_adapter("default")
    assert model.head.bias.requires_grad
    with pytest.warns(UserWarning, match="biases"), model.disable_adapter():
        pass


def test_deleting_an_adapter_hands_over_to_another() -> None:
    model, outputs = _two_adapters()
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and list(model.peft_config) == ["other"]
    assert torch.equal(model(X), outputs["other"])
    assert type(model.body.first) is nn.Linear, "no adapter is left there"
    assert all("default" not in name for name, _ in model.named_parameters())
    assert model.body.second.lora_A["other"].requires_grad
    model.delete_adapter("other")
    assert torch.equal(model(X), outputs["base"]) and model.active_adapters == []
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.delete_adapter("other")
    model.add_adapter("again", _lora())
    assert model.active_adapters == ["again"]


def test_deleting_a_merged_adapter_takes_it_out_of_the_weights() -> None:
    model, outputs = _two_adapters()
    model.merge_adapter()
    model.delete_adapter("default")
    torch.testing.assert_close(model(X), outputs["other"])


def test_switching_adapters_takes_a_merged_one_out_of_the_weights() -> None:
    model, outputs = _two_adapters()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        model.set_adapter("other")
    torch.testing.assert_close(model(X), outputs["other"])
    model.set_adapter(["default", "other"])
    both = model(X)
    model.merge_adapter(["other"])
    torch.testing.assert_close(model(X), both, msg="the one that is not merged still acts")


def test_a_merged_adapter_is_not_changed_behind_the_weights_back(tmp_path: Path) -> None:
    model = rw.get_peft_model(_block(), _adalora())
    _train(model, 5)
    weight = model.body.first.weight.clone()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.finalize_ranks()
    model.unmerge_adapter()
    torch.testing.assert_close(model.body.first.weight, weight)
    model.finalize_ranks()
    embedded = rw.get_peft_model(llama(), _lora(target_modules=["embed_tokens"]))
    embedded.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        embedded.save_pretrained(
            tmp_path
        )  # the file would hold the merged embedding, and the adapter once more
    embedded.save_pretrained(tmp_path, save_embedding_layers=False)


def test_deleting_the_adalora_adapter_lets_another_train() -> None:
    model = rw.get_peft_model(_block(), _adalora())
    with pytest.raises(ValueError, match="'default' trains already"):
        model.add_adapter("second", _adalora())
    assert list(model.peft_config) == ["default"]
    model.add_adapter("idle", _adalora(inference_mode=True))
    model.delete_adapter("default")
    assert model.allocation_state is None
    model.add_adapter("second", _adalora())
    model.set_adapter("second")
    _train(model, 12)
    assert model.allocation_state.reached_target
    assert {row.init_r for row in model.rank_summary().layers} == {4}


def test_get_peft_model_on_an_adapted_model_adds_and_sets() -> None:
    model = rw.get_peft_model(_block(), _lora())
    assert rw.get_peft_model(model, _adalora(), adapter_name="ranks") is model
    assert model.active_adapters == ["ranks"] and list(model.peft_config) == ["default", "ranks"]
    with pytest.raises(ValueError, match="'ranks' already"):
        rw.get_peft_model(model, _lora(), adapter_name="ranks")


def test_adapters_load_beside_others(tmp_path: Path) -> None:
    model, outputs = _two_adapters()
    model.save_pretrained(tmp_path)
    fresh = rw.PeftModel.from_pretrained(_block(), tmp_path)
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


# Merging.


def test_merging_named_adapters_takes_their_heads() -> None:
    model = rw.get_peft_model(_block(), _lora())
    model.add_adapter("headed", _lora(modules_to_save=["head"]))
    with torch.no_grad():
        model.head.modules_to_save["headed"].bias.fill_(7.0)
    model.set_adapter(["default", "headed"])
    expected = model(X)
    merged = model.merge_and_unload(adapter_names=["default", "headed"])
    torch.testing.assert_close(merged(X), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_are_not_merged_into(target: str) -> None:
    model = llama(tie_word_embeddings=True).eval()
    rw.get_peft_model(model, _lora(target_modules=["q_proj", target])).eval()
    expected = model(TOKENS).logits
    state = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="shared with"):
            merge()
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    assert torch.equal(model(TOKENS).logits, expected)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # what the message says
    torch.testing.assert_close(model.merge_and_unload()(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_tied_weights_in_modules_to_save_are_not_merged_into() -> None:
    model = llama(tie_word_embeddings=True)
    rw.get_peft_model(model, _lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])).eval()
    with torch.no_grad():
        model.get_input_embeddings().modules_to_save["default"].weight.add_(0.1)
    expected = model(TOKENS).logits
    with pytest.raises(ValueError, match="embed_tokens.*shared with 'lm_head'"):
        model.merge_and_unload()
    assert torch.equal(model(TOKENS).logits, expected) and isinstance(model, rw.PeftModel)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(model.merge_and_unload()(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_leaves_tied_weights_alone_merges() -> None:
    model = rw.get_peft_model(llama(tie_word_embeddings=True), _lora(target_modules=["q_proj"])).eval()
    model.add_adapter("tied", _lora(target_modules=["lm_head"]))
    expected = model(TOKENS).logits
    torch.testing.assert_close(model.merge_and_unload()(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_safe_merge_refuses_and_nothing_is_merged() -> None:
    model, outputs = _two_adapters()
    with torch.no_grad():
        model.body.second.lora_B["default"][0, 0] = float("nan")
    before = _snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="'body.second'.*NaN"):
            merge(safe_merge=True)
    after = _snapshot(model)
    weights = [key for key in before["state"] if key.endswith("weight")]
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in weights)
    assert before["classes"] == after["classes"]


# Copies.


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("steps", [0, 5, 12])
def test_copies_compute_the_same_and_train_on_their_own(way: str, steps: int, tmp_path: Path) -> None:
    model = rw.get_peft_model(_block(), _adalora(target_r=1, modules_to_save=["head"]))
    _train(model, steps)
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
    _train(other, 12 - steps or 1, seed=9)
    assert torch.equal(model(X), before) and [row.rank for row in model.rank_summary().layers] == ranks
    assert model.allocation_state.step == steps and other.allocation_state.step == max(12, steps + 1)
    assert sum(row.rank for row in other.rank_summary().layers) == 2
    records = other.rank_history.records
    assert records[-1].budget == 2 and (steps == 12 or len(records) > len(model.rank_history.records))
    other.update_and_allocate  # bound to the copy  # noqa: B018
    assert other.unload() is other and type(other) is Block


def test_a_copied_transformers_model_finds_its_own_controller() -> None:
    model = rw.get_peft_model(llama(), _adalora(target_modules=["q_proj", "v_proj"]))
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


# Names that scripts written for PEFT use.


@pytest.mark.parametrize("make", [_block, llama])
def test_base_model_takes_update_and_allocate(make: Any) -> None:
    targets = ["second"] if make is _block else ["q_proj"]
    model = rw.get_peft_model(make(), _adalora(target_modules=targets))
    assert isinstance(model.base_model, nn.Module)
    model.base_model.update_and_allocate(1)
    assert model.allocation_state.step == 1
    if make is llama:
        assert model.base_model is model.model
        model.unload()
        assert not hasattr(model.model, "update_and_allocate")


class Occupied(nn.Module):
    """A user's model whose own attributes have our names."""

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
def test_a_users_own_attributes_of_such_names_stay_his(kind: str) -> None:
    model = Occupied(kind)
    before = _snapshot(model)
    expected, own, described = model(X), model.base_model, model.described
    targets = ["inner", "lora_A"] + (["base_model"] if kind == "module" else [])
    rw.get_peft_model(model, _adalora(target_modules=targets))
    assert torch.equal(model(X), expected) and model.base_model is own and model.scaling == 3.0
    if kind == "text":
        assert model.described == described
    _train(model, 12)
    assert model.allocation_state.reached_target
    moved = model(X)
    assert not torch.equal(moved, expected)
    torch.testing.assert_close(model.merge_and_unload()(X), moved, atol=1e-4, rtol=1e-4)
    assert (
        before["state"].keys() == model.state_dict().keys()
        and before["classes"] == _snapshot(model)["classes"]
    )


def test_sequential_models_keep_indexing_and_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    base = copy.deepcopy(model)
    rw.get_peft_model(model, _lora(target_modules=["0", "2"]))
    assert len(model) == 3 and isinstance(model[0], nn.Linear) and list(model)[2] is model[2]
    assert isinstance(model[:2], nn.Sequential)
    model.save_pretrained(tmp_path)
    assert torch.equal(rw.PeftModel.from_pretrained(base, tmp_path)(X), model(X))


def test_one_adapted_layer_alone_is_refused_with_a_reason() -> None:
    layer = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="target_modules"):
        rw.get_peft_model(layer, _lora())
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
    counters = 4 if kind == "adalora" else 0  # PEFT's AdaLoRA counts one number more for each layer
    trained, total = theirs.get_nb_trainable_parameters()
    assert ours.get_nb_trainable_parameters() == (trained, total - counters)
    if kind == "lora":
        theirs.print_trainable_parameters()
        ours.print_trainable_parameters()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == lines[1] and lines[0].startswith("trainable params: ")


# Inspection.


def test_summary_and_history_after_training() -> None:
    model = rw.get_peft_model(_block(), _adalora(target_r=1, deltaT=2))
    assert [(row.path, row.rank, row.init_r) for row in model.rank_summary().layers] == [
        ("body.first", 4, 4),
        ("body.second", 4, 4),
    ]
    _train(model, 12)
    summary, history = model.rank_summary(), model.rank_history
    assert history.layers == ["body.first", "body.second"]
    assert [record.step for record in history.records] == [0, 4, 6, 8, 9]
    assert history.records[0].budget == 8 and list(history.records[0].ranks) == [4, 4]
    assert all(record.budget == sum(record.ranks) for record in history.records)
    assert list(history.records[-1].ranks) == [row.rank for row in summary.layers]
    assert summary.total_rank == 2 and summary.budget == 8
    sizes = {"body.first": 6 + 8 + 1, "body.second": 8 + 6 + 1}
    assert summary.parameters == sum(row.rank * sizes[row.path] for row in summary.layers)
    assert all(row.importance >= 0 for row in summary.layers)
    assert "rank 2 of 8" in str(summary)


def test_summary_of_a_loaded_adapter_and_of_plain_lora(tmp_path: Path) -> None:
    model = rw.get_peft_model(_block(), _adalora(target_r=1))
    _train(model, 12)
    model.save_pretrained(tmp_path)
    loaded = rw.PeftModel.from_pretrained(_block(), tmp_path)
    here, there = loaded.rank_summary(), model.rank_summary()
    assert [(row.path, row.rank, row.init_r, row.parameters) for row in here.layers] == [
        (row.path, row.rank, row.init_r, row.parameters) for row in there.layers
    ]
    assert loaded.rank_history.records == model.rank_history.records
    assert loaded.allocation_state is None
    plain = rw.get_peft_model(_block(), _lora(rank_pattern={"first": 5})).rank_summary()
    assert [(row.rank, row.init_r) for row in plain.layers] == [(5, 5), (2, 2)]


# Saving.


def test_saving_into_a_folder_keeps_what_others_put_there(tmp_path: Path) -> None:
    model, _ = _two_adapters()
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
    model, _ = _two_adapters()
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    with pytest.raises(ValueError, match="no adapter 'third'"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["other", "third"])
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_a_lora_adapter_saved_over_an_adalora_one_leaves_nothing_of_it(tmp_path: Path) -> None:
    model = rw.get_peft_model(_block(), _adalora())
    _train(model, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"rank_history.json", "training_state.safetensors"}
    other, outputs = _two_adapters()
    other.save_pretrained(tmp_path, selected_adapters=["default"])
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(rw.PeftModel.from_pretrained(_block(), tmp_path)(X), outputs["default"])


# A failure leaves the model as it was.


def _broken_folder(tmp_path: Path, kind: str) -> Path:
    from safetensors.torch import load_file, save_file

    config = {"adalora": _adalora(), "state": _adalora()}.get(kind, _lora())
    model = rw.get_peft_model(_block(), config)
    if kind == "state":
        _train(model, 5)
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
    model = _block().train()
    model.head.weight.requires_grad_(False)
    if adapted:
        rw.get_peft_model(model, _lora())
        model.body.first.weight.requires_grad_(True)
    before, expected = _snapshot(model), model(X)
    with pytest.raises(ValueError):
        rw.PeftModel.from_pretrained(model, folder, "new", is_trainable=True)
    _assert_same(before, _snapshot(model))
    assert torch.equal(model(X), expected)


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
    model = _block()
    if adapted:
        rw.get_peft_model(model, _lora())
        model.head.weight.requires_grad_(True)
    before, expected = _snapshot(model), model(X)
    for config in (rw.LoraConfig(**options), rw.AdaLoraConfig(total_step=9, **options)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError):
                rw.get_peft_model(model, config, adapter_name="new")
        _assert_same(before, _snapshot(model))
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("where", ["second layer", "head", "controller"])
def test_a_failure_half_way_leaves_the_model_as_it_was(
    where: str, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out."""
    model = _block()
    if adapted:
        rw.get_peft_model(model, _lora(target_modules=["second"]))
    model.head.weight.requires_grad_(True)
    before, expected = _snapshot(model), model(X)
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
        monkeypatch.setattr("rankwise.model.named.Controller", fail)
    with pytest.raises(torch.OutOfMemoryError, match="mine"):
        rw.get_peft_model(model, _adalora(modules_to_save=["head"]), adapter_name="new")
    _assert_same(before, _snapshot(model))
    assert torch.equal(model(X), expected)


def test_a_checkpoint_of_another_adapter_changes_nothing(tmp_path: Path) -> None:
    rw.get_peft_model(_block(), _lora(target_modules=["first"])).save_pretrained(tmp_path)
    model, outputs = _two_adapters()
    before = _snapshot(model)
    with pytest.raises(ValueError, match=r"body\.second"):
        model.load_checkpoint(tmp_path)
    _assert_same(before, _snapshot(model))
    assert storage.read_adapter(tmp_path).factors.keys() == {"body.first"}


@pytest.mark.parametrize("wrong", [None, "text", 3])
def test_what_is_no_model_or_no_configuration_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        rw.get_peft_model(wrong, _lora())
    with pytest.raises(TypeError, match="LoraConfig"):
        rw.get_peft_model(_block(), wrong)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        rw.PeftModel.from_pretrained(wrong, "somewhere")


def test_a_model_or_configuration_of_peft_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(target_modules=["first"])
    with pytest.raises(TypeError, match="another library"):
        rw.get_peft_model(_block(), theirs)
    with pytest.raises(ValueError, match="PEFT"):
        rw.get_peft_model(peft.get_peft_model(_block(), theirs), _lora())


# Layers that others have prepared.


def test_layers_with_accelerates_hooks_are_adapted() -> None:
    """A model that is spread over several devices has its layers' forward replaced, object by object."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, seen = _block(), []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    for layer in (model.body.first, model.head):
        hooks.add_hook_to_module(layer, Hook())
    expected = model(X)
    rw.get_peft_model(model, _lora(target_modules=["first"], modules_to_save=["head"]))
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
    model = _block()
    model.body.second.forward = lambda x: x[:, :6]
    before = _snapshot(model)
    for options in ({}, {"target_modules": ["first"], "modules_to_save": ["second"]}):
        with pytest.raises(ValueError, match=r"'body\.second'.*forward"):
            rw.get_peft_model(model, _lora(**options))
        _assert_same(before, _snapshot(model))
