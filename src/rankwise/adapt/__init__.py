"""Adaptive ranks on LoRA layers of other libraries, such as PEFT's, or of the user."""

from __future__ import annotations

from rankwise.adapt.ranks import AdaptiveRanks, adapt_ranks

__all__ = ["AdaptiveRanks", "adapt_ranks"]
