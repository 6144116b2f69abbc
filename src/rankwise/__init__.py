"""Adaptive-rank fine-tuning: LoRA whose ranks are found, not guessed.

Names and file formats are those of Hugging Face PEFT; see the README.
"""

from __future__ import annotations

from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.convert import save_as_lora
from rankwise.history import RankHistory, RankRecord
from rankwise.model import PeftModel, get_peft_model
from rankwise.prepare import prepare_model_for_kbit_training
from rankwise.runstate import AllocationState
from rankwise.schedule import BudgetSchedule, Phase
from rankwise.summary import LayerRank, RankSummary

__version__ = "0.1.0"

__all__ = [
    "AdaLoraConfig",
    "AllocationState",
    "BudgetSchedule",
    "LayerRank",
    "LoraConfig",
    "PeftModel",
    "Phase",
    "RankHistory",
    "RankRecord",
    "RankSummary",
    "get_peft_model",
    "prepare_model_for_kbit_training",
    "save_as_lora",
]
