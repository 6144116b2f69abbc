"""PEFT's names for kinds of adapters and kinds of tasks, as enumerations."""

from __future__ import annotations

from enum import Enum


class _Word(str, Enum):
    """An enumeration of words. Each member compares, prints and saves as its text."""

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


class PeftType(_Word):
    """The kinds of adapters that ``peft_type`` names.

    Example:
        >>> from rankwise import LoraConfig
        >>> LoraConfig().peft_type, LoraConfig().peft_type == "LORA", f"{PeftType.LORA}"
        (<PeftType.LORA: 'LORA'>, True, 'LORA')
    """

    LORA = "LORA"
    ADALORA = "ADALORA"


class TaskType(_Word):
    """The kinds of tasks that ``task_type`` names. Plain text, such as "CAUSAL_LM", means the same.

    Example:
        >>> from rankwise import LoraConfig
        >>> LoraConfig(task_type=TaskType.CAUSAL_LM).task_type
        'CAUSAL_LM'
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
