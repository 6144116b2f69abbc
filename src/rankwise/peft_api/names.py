"""PEFT's words for kinds of adapters and of tasks."""

from __future__ import annotations

from enum import Enum

from rankwise.config import TASK_TYPES, LoraConfig

PeftConfig = (
    LoraConfig  # what all configurations are: `PeftConfig.from_pretrained(folder)` reads any adapter's
)


class PeftType(str, Enum):
    """Kinds of adapters.

    Example:
        >>> PeftConfig(target_modules=["q"]).peft_type == PeftType.LORA
        True
    """

    LORA = "LORA"
    ADALORA = "ADALORA"


TaskType = Enum("TaskType", {name: name for name in TASK_TYPES}, type=str)  # type: ignore[misc]
TaskType.__doc__ = """Kinds of tasks, for `task_type`; the plain words do as well."""
