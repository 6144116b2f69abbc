"""Adaptive-rank fine-tuning: LoRA whose ranks are found, not guessed.

Names and file formats are those of Hugging Face PEFT; see the README.
"""

from __future__ import annotations

from rankwise.attach.prepare import prepare_model_for_kbit_training
from rankwise.attach.probe import LayerSpectrum, Probe, probe
from rankwise.attach.rank_plan import RankPlan
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.method.schedule import BudgetSchedule, Phase
from rankwise.model import PeftModel, get_peft_model
from rankwise.peft_api import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftConfig,
    PeftType,
    TaskType,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from rankwise.run.history import RankHistory, RankRecord
from rankwise.run.state import AllocationState
from rankwise.run.summary import LayerRank, RankSummary
from rankwise.storage.compress import compress_adapter, compression_curve
from rankwise.storage.export import export_adapter, save_as_lora

__version__ = "0.1.0"

__all__ = [
    "AdaLoraConfig",
    "AllocationState",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BudgetSchedule",
    "LayerRank",
    "LayerSpectrum",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "Phase",
    "Probe",
    "RankHistory",
    "RankPlan",
    "RankRecord",
    "RankSummary",
    "TaskType",
    "compress_adapter",
    "compression_curve",
    "export_adapter",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "probe",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
