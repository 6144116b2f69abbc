"""Configurations: which layers to adapt, with how many ranks, on which schedule."""

from __future__ import annotations

from rankwise.config.adalora import AdaLoraConfig
from rankwise.config.lora import CONFIG_NAME, TASK_TYPES, LoraConfig

__all__ = ["CONFIG_NAME", "TASK_TYPES", "AdaLoraConfig", "LoraConfig"]
