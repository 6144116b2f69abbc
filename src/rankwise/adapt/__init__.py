"""Adaptive ranks on LoRA layers that are not rankwise's: PEFT's, another library's, or the user's own."""

from __future__ import annotations

from rankwise.adapt.ranks import AdaptiveRanks, adapt_ranks

__all__ = ["AdaptiveRanks", "adapt_ranks"]
