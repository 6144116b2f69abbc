"""Transformers' Trainer for language models."""

from __future__ import annotations

from typing import Any

from rankwise.recipes.trainer import RecipeTrainer


class LanguageTrainer(RecipeTrainer):
    """Reports the loss per token over all held-out tokens. A mean over batches would count tokens differently."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        exact = output.metrics.pop(f"{metric_key_prefix}_token_loss", None)
        if exact is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = exact
        return output
