"""An adapter in the form that a server reads, one file for each."""

from __future__ import annotations

from rankwise.storage.export.peft_lora import save_as_lora

__all__ = ["save_as_lora"]
