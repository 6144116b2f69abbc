"""Embeddings in adapter files: saved if they are needed, and never required of models that have none."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import rankwise as rw
from other_models import wav2vec2
from tiny import llama, token_batches, told

IDS = torch.tensor([[3, 5, 65, 68]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(base: Path, tokens: int = 70) -> Any:
    """The model in a folder with more tokens. The new embeddings are random each time, as for a user."""
    model = LlamaForCausalLM.from_pretrained(base)
    if tokens != model.config.vocab_size:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[64:].normal_()
    return model.eval()


def lora(**changes: Any) -> rw.LoraConfig:
    return rw.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **changes})


def names(folder: Path) -> set[str]:
    held = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.") for name in held if "lora_" not in name}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}
OPTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "layers": ({}, EMBEDDINGS),
    "an embedding, too": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"model.embed_tokens.base_layer.weight", "lm_head.weight"},
    ),
    "the embedding as a whole": ({"modules_to_save": ["embed_tokens"]}, EMBEDDINGS),
    "both as a whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, EMBEDDINGS),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("library", ["rankwise", "peft"])
def test_a_resized_vocabulary_is_saved_with_the_adapter_and_reported(
    option: str, library: str, base: Path, tmp_path: Path
) -> None:
    changes, wanted = OPTIONS[option]
    model = rw.get_peft_model(resized(base), lora(**changes)).eval()
    for module in model.modules():  # make modules that train in full differ from their originals
        if hasattr(module, "modules_to_save"):
            module.modules_to_save["default"].weight.data.mul_(1.5)
    with told() as messages:
        model.save_pretrained(tmp_path / "adapter")
    assert any("70 tokens, but the base model's checkpoint 64" in each for each in messages)
    assert names(tmp_path / "adapter") == wanted
    there = resized(base)
    assert not torch.allclose(logits(there), logits(resized(base))), "new rows are random"
    if library == "rankwise":
        loaded = rw.PeftModel.from_pretrained(there, tmp_path / "adapter")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = peft.PeftModel.from_pretrained(there, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


def test_an_adapter_of_peft_on_a_resized_vocabulary_loads(base: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            resized(base), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        theirs.eval().save_pretrained(tmp_path / "adapter")
    assert names(tmp_path / "adapter") == EMBEDDINGS
    loaded = rw.PeftModel.from_pretrained(resized(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(theirs), atol=1e-5, rtol=0)


def test_no_embeddings_are_saved_if_the_vocabulary_is_that_of_the_checkpoint_or_unknown(
    base: Path, tmp_path: Path
) -> None:
    gone = LlamaForCausalLM.from_pretrained(base)
    gone.config._name_or_path = str(tmp_path / "not there")
    # A GGUF file stands in a folder without a configuration, for which Transformers gives its defaults.
    packed = LlamaForCausalLM.from_pretrained(base)
    packed.config._name_or_path = str(tmp_path / "packed")
    (tmp_path / "packed").mkdir()
    for number, model in enumerate((LlamaForCausalLM.from_pretrained(base), llama(), gone, packed)):
        adapted = rw.get_peft_model(model, lora())
        with told() as messages:
            adapted.save_pretrained(tmp_path / str(number))
        assert names(tmp_path / str(number)) == set() and not messages
    model = rw.get_peft_model(resized(base), lora())
    with told() as messages:
        model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert names(tmp_path / "without") == set() and not messages


def test_saving_all_embeddings_leaves_an_adapters_own_copies_alone(tmp_path: Path) -> None:
    model = rw.get_peft_model(llama(), lora(modules_to_save=["embed_tokens"])).eval()
    copy = model.model.embed_tokens.modules_to_save["default"]
    copy.weight.data.mul_(2)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(held["base_model.model.model.embed_tokens.weight"], copy.weight)
    assert torch.equal(held["base_model.model.lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["embed_tokens"]}])
def test_a_base_without_the_new_tokens_is_refused_with_the_call_that_adds_them(
    changes: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    with told():
        rw.get_peft_model(resized(base), lora(**changes)).save_pretrained(tmp_path / "adapter")
    model = LlamaForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(70\)"):
        rw.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not hasattr(model, "peft_config") and model.config.vocab_size == 64


@pytest.mark.parametrize("way", ["from_pretrained", "load_checkpoint"])
def test_a_run_on_a_resized_vocabulary_goes_on_with_the_same_embeddings(
    way: str, base: Path, tmp_path: Path
) -> None:
    config = rw.AdaLoraConfig(
        init_r=4, target_r=2, total_step=8, tfinal=2, target_modules=["q_proj", "v_proj"]
    )

    def train(model: Any, optimizer: Any, steps: range) -> list[float]:
        losses = []
        for batch in token_batches(8)[steps.start : steps.stop]:
            loss = model(**batch).loss
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def optimizer_of(model: Any) -> Any:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    model = rw.get_peft_model(resized(base), config).train()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(0, 4))
    with told():
        model.save_pretrained(tmp_path / "checkpoint-4")
    wanted = train(model, optimizer, range(4, 8))
    other = resized(base)
    if way == "from_pretrained":
        again = rw.PeftModel.from_pretrained(other, tmp_path / "checkpoint-4", is_trainable=True).train()
    else:
        again = rw.get_peft_model(other, config).train()
        again.load_checkpoint(tmp_path / "checkpoint-4")
    assert not again.model.embed_tokens.weight.requires_grad
    assert train(again, optimizer_of(again), range(4, 8)) == wanted


# Models without embeddings.


class Raises(nn.Module):
    """A model whose getters raise the given error."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error, self.layer = error, nn.Linear(4, 4)

    def get_input_embeddings(self) -> Any:
        raise self.error("not auto-handled")

    get_output_embeddings = get_input_embeddings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("save", ["auto", True, False])
@pytest.mark.parametrize("error", [NotImplementedError, AttributeError, TypeError, KeyError])
def test_models_that_have_no_embeddings_are_saved(
    error: type[Exception], save: bool | str, tmp_path: Path
) -> None:
    x = torch.randn(2, 4)
    torch.manual_seed(0)
    model = rw.get_peft_model(Raises(error), lora(target_modules="all-linear"))
    model.save_pretrained(tmp_path, save_embedding_layers=save)
    torch.manual_seed(0)
    assert torch.equal(rw.PeftModel.from_pretrained(Raises(error), tmp_path)(x), model(x))


def test_an_adapted_input_layer_for_pictures_is_not_a_vocabulary(tmp_path: Path) -> None:
    """SigLIP 2's patch embedding is a linear layer that the model declares as its input embedding."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    def model() -> Any:
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        return Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=4, patch_size=2))

    adapted = rw.get_peft_model(model(), lora(target_modules="all-linear"))
    assert "lora_A" in dict(adapted.get_input_embeddings().named_children())
    adapted.save_pretrained(tmp_path / "auto")
    assert names(tmp_path / "auto") == set()
    adapted.save_pretrained(tmp_path / "all", save_embedding_layers=True)
    assert len(names(tmp_path / "all")) == 2, "weight and bias"
    for folder in ("auto", "all"):
        rw.PeftModel.from_pretrained(model(), tmp_path / folder)


def test_a_trainer_on_wav2vec2_writes_and_resumes_its_checkpoints(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    sounds = [
        {"input_values": sound, "labels": torch.tensor([3, 4])}
        for sound in torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    ]

    def trainer(steps: int) -> Any:
        model = rw.get_peft_model(wav2vec2(), lora(target_modules="all-linear"))
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=2,
            disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=sounds)

    trainer(2).train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    config = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert trainer(3).train(resume_from_checkpoint=True).global_step == 3
