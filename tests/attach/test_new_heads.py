"""Warnings about modules that no checkpoint has filled and that would stay frozen."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import rankwise as rw

transformers = pytest.importorskip("transformers")


def config(**more: Any) -> Any:
    sizes = dict(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0, **more)


def bert_config() -> Any:
    sizes = dict(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.BertConfig(**sizes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertForMaskedLM(bert_config()).save_pretrained(folder)
    return folder


def said(model: nn.Module, **fields: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rw.get_peft_model(model, rw.LoraConfig(r=2, **fields))
    return [str(each.message) for each in caught if "newly initialized" in str(each.message)]


def test_the_new_head_of_a_classifier_made_from_a_language_model_is_reported(llama: Path) -> None:
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    (message,) = said(load(llama))
    assert message.startswith("'score' of this LlamaForSequenceClassification")
    assert "`task_type='SEQ_CLS'`, or `modules_to_save=['score']`" in message
    for mend in (dict(task_type="SEQ_CLS"), dict(modules_to_save=["score"])):
        assert said(load(llama), **mend) == []


@pytest.mark.parametrize(
    ("kind", "head", "task"),
    [
        ("BertForSequenceClassification", "classifier", "SEQ_CLS"),
        ("BertForTokenClassification", "classifier", "TOKEN_CLS"),
        ("BertForQuestionAnswering", "qa_outputs", "QUESTION_ANS"),
        ("BertForMultipleChoice", "classifier", None),
    ],
)
def test_every_new_head_is_reported_with_the_setting_to_use(
    bert: Path, kind: str, head: str, task: str | None
) -> None:
    (message,) = said(getattr(transformers, kind).from_pretrained(bert))
    assert repr(head) in message and f"modules_to_save=['{head}']" in message
    assert ("task_type" in message) == (task is not None) and (task or "") in message


def test_a_head_that_was_loaded_is_not_reported(bert: Path, llama: Path, tmp_path: Path) -> None:
    assert said(transformers.BertForMaskedLM.from_pretrained(bert)) == []
    assert said(transformers.LlamaForCausalLM.from_pretrained(llama)) == []
    assert (
        said(transformers.BertModel.from_pretrained(bert)) == []
    )  # its pooler is new, but may not be needed
    transformers.BertForSequenceClassification.from_pretrained(bert).save_pretrained(tmp_path)
    assert said(transformers.BertForSequenceClassification.from_pretrained(tmp_path)) == []


def test_a_head_of_another_size_than_the_checkpoints_is_reported(bert: Path, tmp_path: Path) -> None:
    transformers.BertForSequenceClassification.from_pretrained(bert).save_pretrained(tmp_path)
    options = dict(num_labels=5, ignore_mismatched_sizes=True)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path, **options)
    assert "'classifier'" in said(model)[0]


def test_a_users_own_head_on_a_pretrained_model_is_reported(bert: Path) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = transformers.BertModel.from_pretrained(bert)
            self.tags = nn.Linear(8, 3)

    (message,) = said(Tagger(), target_modules=["query"])
    assert "'tags'" in message and "modules_to_save=['tags']" in message
    assert said(Tagger(), target_modules=["query"], modules_to_save=["tags"]) == []
    assert said(Tagger(), target_modules=["query", "tags"]) == []  # the new layer is adapted


def test_a_classifier_made_from_a_configuration_is_reported() -> None:
    assert "'classifier'" in said(transformers.BertForSequenceClassification(bert_config()))[0]
    assert said(transformers.BertForMaskedLM(bert_config())) == []
    assert said(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"]) == []


def test_an_output_layer_that_no_checkpoint_has_is_reported_but_a_resized_vocabulary_is_not(
    llama: Path, tmp_path: Path
) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(40)
    assert said(model) == []
    transformers.LlamaForCausalLM.from_pretrained(llama).model.save_pretrained(tmp_path)
    assert "'lm_head'" in said(transformers.LlamaForCausalLM.from_pretrained(tmp_path))[0]


def test_an_adapter_for_inference_says_nothing_of_heads(bert: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(bert)
    assert said(model, inference_mode=True) == []
