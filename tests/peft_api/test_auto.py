"""`AutoPeftModelFor…` loads base model and adapter from the adapter's folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise import peft_api

transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
X = torch.arange(6).view(2, 3)


def saved_base(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    if kind.startswith("T5"):
        small = dict(
            vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    elif kind.startswith("Llama"):
        model = getattr(transformers, kind)(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    else:
        model = getattr(transformers, kind)(transformers.BertConfig(**SIZES))
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


KINDS = [
    ("LlamaForCausalLM", "CAUSAL_LM", rw.AutoPeftModelForCausalLM),
    ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM", rw.AutoPeftModelForSeq2SeqLM),
    ("BertForSequenceClassification", "SEQ_CLS", rw.AutoPeftModelForSequenceClassification),
    ("BertForTokenClassification", "TOKEN_CLS", rw.AutoPeftModelForTokenClassification),
    ("BertForQuestionAnswering", "QUESTION_ANS", rw.AutoPeftModelForQuestionAnswering),
    ("BertModel", "FEATURE_EXTRACTION", rw.AutoPeftModelForFeatureExtraction),
]


@pytest.mark.parametrize(("kind", "task", "auto"), KINDS)
def test_each_loads_its_class_and_the_adapter(kind: str, task: str, auto: Any, tmp_path: Path) -> None:
    base = saved_base(kind, tmp_path / "base")
    model = rw.get_peft_model(base, rw.LoraConfig(r=2, task_type=task, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    more = dict(decoder_input_ids=X) if kind.startswith("T5") else {}
    for each in (auto, rw.AutoPeftModel):
        loaded = each.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
        assert loaded.__class__.__name__ == kind and not loaded.training
        assert torch.equal(loaded(X, **more)[0], model(X, **more)[0])
    trained = auto.from_pretrained(str(tmp_path / "adapter"), "mine", True)
    assert trained.active_adapters == ["mine"] and any(p.requires_grad for p in trained.parameters())


def test_pefts_folder_without_a_task_loads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = saved_base("BertModel", tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(X)[0]
    loaded = rw.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(loaded(X)[0], expected, atol=1e-6)


def test_a_vocabulary_that_was_resized_is_resized_again(tmp_path: Path) -> None:
    base = saved_base("LlamaForCausalLM", tmp_path / "base")
    base.resize_token_embeddings(40)
    model = rw.get_peft_model(base, rw.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    loaded = rw.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = X + 34
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)


def test_a_base_that_says_nothing_of_embeddings_loads(tmp_path: Path) -> None:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    convolutions = dict(conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4)
    config = transformers.Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embedding_groups=2)
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "base")
    base = transformers.Wav2Vec2Model.from_pretrained(tmp_path / "base")
    with pytest.raises(NotImplementedError):
        base.get_input_embeddings()
    config = rw.LoraConfig(
        r=2, task_type="FEATURE_EXTRACTION", target_modules=["q_proj"], init_lora_weights=False
    )
    model = rw.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = rw.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    sound = torch.randn(1, 400)
    assert torch.equal(loaded(sound)[0], model(sound)[0])


def test_folders_without_a_base_or_a_class_are_refused_with_the_function_to_call(tmp_path: Path) -> None:
    model = rw.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), rw.LoraConfig(r=2, target_modules=["0"])
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no base model.*PeftModel\.from_pretrained\(base, folder\)"):
        rw.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text()) | {"base_model_name_or_path": "x"}
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="no `task_type`, so the base model's class is not known"):
        rw.AutoPeftModel.from_pretrained(tmp_path)
    path.write_text(
        json.dumps(data | {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}})
    )
    with pytest.raises(ValueError, match=r"os\.system.*not in Transformers"):
        rw.AutoPeftModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        rw.AutoPeftModel.from_pretrained(tmp_path / "nothing")
    with pytest.raises(TypeError, match=r"use AutoPeftModelForCausalLM\.from_pretrained"):
        rw.AutoPeftModelForCausalLM(tmp_path)


def test_every_name_of_the_package_is_the_librarys_too() -> None:
    assert all(
        getattr(rw, name) is getattr(peft_api, name) and name in rw.__all__ for name in peft_api.__all__
    )


def test_pefts_words_are_their_texts() -> None:
    peft = pytest.importorskip("peft")
    for ours, theirs in (
        (rw.TaskType, peft.TaskType),
        (rw.PeftType, [peft.PeftType.LORA, peft.PeftType.ADALORA]),
    ):
        assert [each.value for each in ours] == [each.value for each in theirs]
        assert all(each == each.value == f"{each}" == str(each) for each in ours)
    config = rw.LoraConfig(task_type=rw.TaskType.SEQ_CLS, peft_type=peft.PeftType.LORA)  # type: ignore[call-arg]
    assert config.task_type == "SEQ_CLS" and config.peft_type == peft.PeftType.LORA
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == "LORA"
