"""Merging into the base weights, and the cases in which it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from block_world import TOKENS, Block, X, adalora, block, lora, snapshot, train, two_adapters
from tiny import llama


def test_merge_and_unload_returns_the_plain_model_with_the_adapters_output() -> None:
    model = rw.get_peft_model(block(), lora(modules_to_save=["head"]))
    with torch.no_grad():
        model.head.modules_to_save["default"].weight.add_(1.0)
    expected = model(X)
    assert model.merge_and_unload() is model
    assert type(model) is Block and type(model.body.first) is nn.Linear and type(model.head) is nn.Linear
    assert model.state_dict().keys() == block().state_dict().keys()
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(model, "peft_config")
    rw.get_peft_model(model, adalora())
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)


def test_deleting_a_merged_adapter_takes_it_out_of_the_weights() -> None:
    model, outputs = two_adapters()
    model.merge_adapter()
    model.delete_adapter("default")
    torch.testing.assert_close(model(X), outputs["other"])


def test_switching_adapters_takes_a_merged_one_out_of_the_weights() -> None:
    model, outputs = two_adapters()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        model.set_adapter("other")
    torch.testing.assert_close(model(X), outputs["other"])
    model.set_adapter(["default", "other"])
    both = model(X)
    model.merge_adapter(["other"])
    torch.testing.assert_close(model(X), both, msg="the one that is not merged still acts")


def test_a_merged_adapter_is_not_changed_behind_the_weights_back(tmp_path: Path) -> None:
    model = rw.get_peft_model(block(), adalora())
    train(model, 5)
    weight = model.body.first.weight.clone()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.finalize_ranks()
    model.unmerge_adapter()
    torch.testing.assert_close(model.body.first.weight, weight)
    model.finalize_ranks()
    embedded = rw.get_peft_model(llama(), lora(target_modules=["embed_tokens"]))
    embedded.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        embedded.save_pretrained(tmp_path)  # the file would hold the merged embedding and the adapter as well
    embedded.save_pretrained(tmp_path, save_embedding_layers=False)


def test_merging_named_adapters_takes_their_heads() -> None:
    model = rw.get_peft_model(block(), lora())
    model.add_adapter("headed", lora(modules_to_save=["head"]))
    with torch.no_grad():
        model.head.modules_to_save["headed"].bias.fill_(7.0)
    model.set_adapter(["default", "headed"])
    expected = model(X)
    merged = model.merge_and_unload(adapter_names=["default", "headed"])
    torch.testing.assert_close(merged(X), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_are_not_merged_into(target: str) -> None:
    model = llama(tie_word_embeddings=True).eval()
    rw.get_peft_model(model, lora(target_modules=["q_proj", target])).eval()
    expected = model(TOKENS).logits
    state = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="shared with"):
            merge()
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    assert torch.equal(model(TOKENS).logits, expected)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # the message's advice
    torch.testing.assert_close(model.merge_and_unload()(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_tied_weights_in_modules_to_save_are_not_merged_into() -> None:
    model = llama(tie_word_embeddings=True)
    rw.get_peft_model(model, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])).eval()
    with torch.no_grad():
        model.get_input_embeddings().modules_to_save["default"].weight.add_(0.1)
    expected = model(TOKENS).logits
    with pytest.raises(ValueError, match="embed_tokens.*shared with 'lm_head'"):
        model.merge_and_unload()
    assert torch.equal(model(TOKENS).logits, expected) and isinstance(model, rw.PeftModel)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(model.merge_and_unload()(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_leaves_tied_weights_alone_merges() -> None:
    model = rw.get_peft_model(llama(tie_word_embeddings=True), lora(target_modules=["q_proj"])).eval()
    model.add_adapter("tied", lora(target_modules=["lm_head"]))
    expected = model(TOKENS).logits
    torch.testing.assert_close(model.merge_and_unload()(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_safe_merge_refuses_and_nothing_is_merged() -> None:
    model, outputs = two_adapters()
    with torch.no_grad():
        model.body.second.lora_B["default"][0, 0] = float("nan")
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="'body.second'.*NaN"):
            merge(safe_merge=True)
    after = snapshot(model)
    weights = [key for key in before["state"] if key.endswith("weight")]
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in weights)
    assert before["classes"] == after["classes"]
