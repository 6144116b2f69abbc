"""Adaptive-rank fine-tuning: LoRA whose ranks are found, not guessed.

Names and file formats are those of Hugging Face PEFT. The README has the first steps.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rankwise.adapt import AdaptiveRanks, SpedUp, adapt_ranks, speed_up
from rankwise.attach.prepare import prepare_model_for_kbit_training
from rankwise.attach.probe import LayerSpectrum, Probe, probe
from rankwise.attach.rank_plan import RankPlan
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.config.lora import when_made
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
from rankwise.run.pairs import FactorPair
from rankwise.run.state import AllocationState
from rankwise.run.summary import LayerRank, RankSummary
from rankwise.storage.compress import compress_adapter, compression_curve
from rankwise.storage.export import export_adapter, save_as_lora

if TYPE_CHECKING:
    from rankwise.integrations.adapt_ranks import AdaptRanks

__version__ = "0.1.0"

__all__ = [
    "AdaLoraConfig",
    "AdaptRanks",
    "AdaptiveRanks",
    "AllocationState",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BudgetSchedule",
    "FactorPair",
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
    "SpedUp",
    "TaskType",
    "adapt_ranks",
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
    "speed_up",
]


def _teach_trainers() -> None:
    """Teach Transformers' trainers to explain rankwise's configurations, once Transformers' trainer is imported."""
    if "transformers.trainer" in sys.modules:
        from rankwise.integrations.trl import explain_foreign_configurations

        explain_foreign_configurations()


when_made.append(_teach_trainers)


def __getattr__(name: str) -> Any:
    if name == "AdaptRanks":  # it is a callback of Transformers, which takes seconds to import
        from rankwise.integrations.adapt_ranks import AdaptRanks

        return AdaptRanks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
