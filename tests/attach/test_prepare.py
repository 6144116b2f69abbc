"""`prepare_model_for_kbit_training` has the same effects as PEFT's function on the same models."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import rankwise as rw
from tiny import bert, llama, token_batches

KINDS = {
    "llama in bfloat16": lambda: llama().to(torch.bfloat16),
    "llama in float16": lambda: llama().to(torch.float16),
    "bert in bfloat16": lambda: bert().to(torch.bfloat16),
    "llama in float32": llama,
}


def quantized_llama() -> Any:
    """A model with the attributes of a quantized one that both functions read. Its layers are not quantized."""
    model = llama().to(torch.bfloat16)
    model.is_loaded_in_4bit = True
    return model


def facts(model: nn.Module) -> dict[str, Any]:
    return {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_dtypes_and_frozen_parameters_are_those_of_peft(kind: str, checkpointing: bool):
    model = KINDS[kind]()
    theirs = peft.prepare_model_for_kbit_training(copy.deepcopy(model), checkpointing)
    ours = rw.prepare_model_for_kbit_training(model, checkpointing)
    assert ours is model
    assert facts(ours) == facts(theirs)
    assert {dtype for dtype, _ in facts(ours).values()} == {torch.float32}
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["gptq", "aqlm", "eetq", "torchao", "hqq"])
def test_methods_whose_kernels_need_their_dtypes_keep_them_as_in_peft(method: str):
    model = llama().to(torch.bfloat16)
    model.quantization_method = method
    theirs = peft.prepare_model_for_kbit_training(copy.deepcopy(model), use_gradient_checkpointing=False)
    ours = rw.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert facts(ours) == facts(theirs)
    assert ours.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_checkpointing_is_switched_on_with_its_arguments_as_in_peft(kwargs: dict[str, Any]):
    model = quantized_llama()
    theirs = peft.prepare_model_for_kbit_training(
        copy.deepcopy(model), gradient_checkpointing_kwargs=dict(kwargs)
    )
    ours = rw.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
    assert ours.is_gradient_checkpointing and theirs.is_gradient_checkpointing
    for one, other in zip(ours.model.layers, theirs.model.layers, strict=True):
        assert one.gradient_checkpointing and other.gradient_checkpointing
        assert arguments(one) == arguments(other)


def test_checkpointing_without_arguments_is_the_models_own_default():
    ours, plain = rw.prepare_model_for_kbit_training(quantized_llama()), llama()
    plain.gradient_checkpointing_enable()
    assert arguments(ours.model.layers[0]) == arguments(plain.model.layers[0])


def arguments(block: Any) -> Any:
    """The keyword arguments with which a block calls `torch.utils.checkpoint.checkpoint`."""
    return block._gradient_checkpointing_func.keywords


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_reach_the_first_adapter_through_checkpoints_and_are_those_of_peft(reentrant: bool):
    options = {"use_reentrant": reentrant}
    batch = token_batches(1)[0]
    gradients = []
    for library in (rw, peft):
        model = quantized_llama()
        model = library.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=dict(options))
        torch.manual_seed(3)
        config = library.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
        model = library.get_peft_model(model, config).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
        model(**batch).loss.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "lora_" in name])
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


def test_checkpointing_is_switched_on_only_if_asked_for():
    model = rw.prepare_model_for_kbit_training(llama(), use_gradient_checkpointing=False)
    assert not model.is_gradient_checkpointing


def test_an_adapter_that_is_there_already_goes_on_training():
    model = rw.get_peft_model(llama(), rw.LoraConfig(r=2, target_modules=["q_proj"]))
    rw.prepare_model_for_kbit_training(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_peft_also_takes_the_argument_for_the_cache():
    assert rw.prepare_model_for_kbit_training(llama(), auto_clear_cache=False)
    with pytest.raises(TypeError, match="auto_clear"):
        rw.prepare_model_for_kbit_training(llama(), auto_clear=False)


def test_models_that_cannot_checkpoint_are_refused_by_name():
    with pytest.raises(ValueError, match="Linear.*use_gradient_checkpointing=False"):
        rw.prepare_model_for_kbit_training(nn.Linear(2, 2))
