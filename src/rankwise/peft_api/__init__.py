"""Functions and classes that users of PEFT know, under PEFT's names, in addition to the methods of a model.

Each is a thin layer over the other packages. PEFT's further features need PEFT's own layers, on which
`rankwise.adapt_ranks` finds ranks.
"""

from __future__ import annotations

from rankwise.config import LoraConfig
from rankwise.config.kinds import PeftType, TaskType
from rankwise.peft_api.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from rankwise.peft_api.inject import inject_adapter_in_model
from rankwise.peft_api.states import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from rankwise.peft_api.status import get_layer_status, get_model_status

# `PeftConfig.from_pretrained(folder)` reads every adapter's configuration, because LoraConfig does.
PeftConfig = LoraConfig

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
