"""Functions and classes that PEFT's users call beside the model's own methods, under PEFT's names.

Each is a thin layer over what is here. What takes more is PEFT's own: `rankwise.adapt_ranks` finds ranks on its layers.
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

PeftConfig = (
    LoraConfig  # what all configurations are: `PeftConfig.from_pretrained(folder)` reads any adapter's
)

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
