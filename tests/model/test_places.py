"""Adapted modules stay in their places, and gradients reach adapters through gradient checkpoints."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from expert_world import tiny_moe
from other_models import t5, vit, wav2vec2, whisper
from tiny import llama, token_batches, told

BATCH = token_batches(1)[0]


def lora(**changes: Any) -> rw.LoraConfig:
    return rw.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **changes})


ON_EMBEDDINGS = {
    "an adapted embedding": (lora(target_modules=["embed_tokens"]), {}),
    "an adapted head": (lora(target_modules=["lm_head", "q_proj"]), {}),
    "an embedding that trains in full": (lora(modules_to_save=["embed_tokens"]), {}),
    "a head that trains in full": (lora(modules_to_save=["lm_head"]), {}),
    "a head tied to the embedding": (lora(modules_to_save=["lm_head"]), {"tie_word_embeddings": True}),
    "a whole body with the embedding in it": (
        lora(target_modules=["lm_head"], modules_to_save=["model"]),
        {},
    ),
}


@pytest.mark.parametrize("case", ON_EMBEDDINGS)
def test_resizing_the_vocabulary_under_an_adapter_is_refused_before_anything_changes(case: str) -> None:
    config, sizes = ON_EMBEDDINGS[case]
    model = rw.get_peft_model(llama(**sizes), config).train()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    for change in (
        lambda: model.resize_token_embeddings(70),
        lambda: model.set_input_embeddings(nn.Embedding(70, 32)),
        lambda: model.set_output_embeddings(nn.Linear(32, 70, bias=False)),
    ):
        with pytest.raises(ValueError, match=r"and with it the adapter.*unload"):
            change()
    assert dict(model.named_modules()) == modules and model.config.vocab_size == 64
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.resize_token_embeddings() is model.get_input_embeddings(), "asking changes nothing"
    base = model.unload()
    assert base.resize_token_embeddings(70).num_embeddings == 70


def test_resizing_embeddings_without_an_adapter_works_and_they_are_saved(tmp_path: Path) -> None:
    model = rw.get_peft_model(llama(), lora())
    model.resize_token_embeddings(70, mean_resizing=False)
    assert not model.get_input_embeddings().weight.requires_grad
    with torch.no_grad():
        model.get_input_embeddings().weight[64:] = 1.0
    with told() as messages:
        model.save_pretrained(tmp_path)
    assert any("has 70 tokens, but the base model's checkpoint 64" in each for each in messages)
    base = llama()
    base.resize_token_embeddings(70, mean_resizing=False)
    loaded = rw.PeftModel.from_pretrained(base, tmp_path)
    ids = torch.tensor([[3, 65, 69]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def replace(model: nn.Module, path: str) -> nn.Module:
    parent, _, name = path.rpartition(".")
    held = model.get_submodule(path)
    setattr(model.get_submodule(parent), name, copy.deepcopy(held))
    return held


CONFIGS = {
    "lora": lora(),
    "adalora": rw.AdaLoraConfig(init_r=2, target_r=1, total_step=9, tfinal=2, target_modules=["q_proj"]),
    "a whole module": lora(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("what", ["a layer", "a block", "an inner resize"])
def test_replaced_modules_are_noticed_at_the_next_pass_and_at_saving(
    kind: str, what: str, tmp_path: Path
) -> None:
    model = rw.get_peft_model(llama(), CONFIGS[kind]).train()
    model(**BATCH).loss.backward()
    if what == "an inner resize":
        lost = "lm_head" if kind == "a whole module" else "model.layers.0.self_attn.q_proj"
        held = replace(model, lost)
    else:
        lost = "model.layers.0.self_attn.q_proj"
        path = lost if what == "a layer" else "model.layers.0"
        held = replace(model, path)
        lost, held_at = lost, path
    with pytest.raises(ValueError, match=f"'{lost}' was replaced after the adapter was attached"):
        model(**BATCH)
    with pytest.raises(ValueError, match="was replaced"):
        model.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="was replaced"):
        model.add_adapter("more", lora())
    assert not (tmp_path / "new").exists() and list(model.peft_config) == ["default"]
    at = lost if what == "an inner resize" else held_at
    setattr(model.get_submodule(at.rpartition(".")[0]), at.rpartition(".")[2], held)
    model(**BATCH).loss.backward()
    model.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "adapter_model.safetensors").is_file()


def test_a_replaced_stack_of_experts_is_noticed(tmp_path: Path) -> None:
    config = lora(target_modules=[], target_parameters=["experts.down_proj"])
    model = rw.get_peft_model(tiny_moe(), config).train()
    model(**BATCH)
    path = next(path for path, _ in model.named_modules() if path.endswith("mlp.experts"))
    fresh = dict(tiny_moe().named_modules())[path]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, fresh)
    with pytest.raises(ValueError, match=rf"'{path}\.down_proj' was replaced"):
        model.save_pretrained(tmp_path)


def test_wrappers_around_adapted_modules_are_no_replacements(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    class Other(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = rw.get_peft_model(llama(), lora(modules_to_save=["lm_head"])).train()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    model.lm_head = Other(model.lm_head)
    model._check_in_place()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(rw.get_peft_model(llama(), lora())))):
        other._check_in_place()


def test_an_adapter_that_was_deleted_is_not_missed(tmp_path: Path) -> None:
    model = rw.get_peft_model(llama(), lora(target_modules=["q_proj"]))
    model.add_adapter("other", lora(target_modules=["v_proj"]))
    replace(model, "model.layers.0.self_attn.v_proj")
    with pytest.raises(ValueError, match="v_proj' was replaced"):
        model.save_pretrained(tmp_path)
    model.delete_adapter("other")
    model.save_pretrained(tmp_path)
    assert type(model.unload()) is type(llama())


# Gradient checkpointing.


MODELS: dict[str, Any] = {
    "llama": (llama, BATCH),
    "vit": (vit, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}),
    "whisper": (whisper, {"input_features": torch.randn(2, 8, 20), "labels": torch.arange(3, 13).view(2, 5)}),
    "wav2vec2": (wav2vec2, {"input_values": torch.randn(2, 400), "labels": torch.tensor([[3, 4], [5, 6]])}),
    "t5": (t5, {"input_ids": BATCH["input_ids"], "labels": BATCH["labels"]}),
}


class Wrapped(nn.Module):
    """A user's own module around a model, without a method that enables checkpointing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def gradients(name: str, when: str, reentrant: bool = True) -> dict[str, torch.Tensor]:
    make, batch = MODELS[name]
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    model = make().double()

    def checkpoint(model: Any) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    if when == "before":
        checkpoint(model)
    if when == "inside":
        inner, model = model, Wrapped(model)
    torch.manual_seed(1)
    rw.get_peft_model(model, lora(target_modules="all-linear"))
    model.train()
    if when == "after":
        checkpoint(model)
    if when == "inside":
        checkpoint(inner)
    model(**batch).loss.backward()
    assert not any(value.requires_grad for value in batch.values()), "the batch is the user's"
    return {name.removeprefix("inner."): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("when", ["before", "after", "inside"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_with_reentrant_checkpointing(name: str, when: str) -> None:
    wanted, found = gradients(name, "never"), gradients(name, when)
    assert wanted and found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-9, rtol=1e-7)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_only_reentrant_checkpointing_asks_for_gradients_of_inputs_and_unloading_ends_it() -> None:
    model = rw.get_peft_model(vit(), lora(target_modules="all-linear")).train()
    _, batch = MODELS["vit"]
    seen: list[bool] = []
    model.vit.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(**batch)
    model.eval()(**batch)
    base = model.unload().train()
    base.gradient_checkpointing_disable()
    base(**batch)
    assert seen == [False, True, False, False]
