"""Adaptive ranks on LoRA layers that are not rankwise's: PEFT's, another library's, or the user's own."""

from __future__ import annotations

from rankwise.adapt.ranks import AdaptiveRanks, adapt_ranks
from rankwise.adapt.speed_up import SpedUp, speed_up

__all__ = ["AdaptiveRanks", "SpedUp", "adapt_ranks", "speed_up"]
