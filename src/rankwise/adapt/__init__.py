"""Adaptive ranks on LoRA layers of other libraries, such as PEFT's, or of the user."""

from __future__ import annotations

from rankwise.adapt.ranks import AdaptiveRanks, adapt_ranks
from rankwise.adapt.speed_up import SpedUp, speed_up

__all__ = ["AdaptiveRanks", "SpedUp", "adapt_ranks", "speed_up"]
