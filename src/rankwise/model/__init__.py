"""Adapted models: `get_peft_model` and the methods that it adds to a model."""

from __future__ import annotations

from rankwise.model.peft_model import PeftModel, get_peft_model

__all__ = ["PeftModel", "get_peft_model"]
