"""PEFT's words for kinds of adapters and of tasks."""

from __future__ import annotations

from enum import Enum


class _Word(str, Enum):
    """A word that is the same as its text everywhere: compared, printed and in a file."""

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


class PeftType(_Word):
    """Kinds of adapters, which `peft_type` says.

    Example:
        >>> from rankwise import LoraConfig
        >>> LoraConfig().peft_type, LoraConfig().peft_type == "LORA", f"{PeftType.LORA}"
        (<PeftType.LORA: 'LORA'>, True, 'LORA')
    """

    LORA = "LORA"
    ADALORA = "ADALORA"


class TaskType(_Word):
    """Kinds of tasks, for `task_type`; the plain words do as well."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
