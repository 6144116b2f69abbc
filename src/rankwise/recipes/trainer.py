"""The trainer of all recipes: Transformers' Trainer, which evaluates every held-out example."""

from __future__ import annotations

from typing import Any

from transformers import Trainer


class RecipeTrainer(Trainer):
    """Evaluates all examples. ``dataloader_drop_last`` applies to training only."""

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of an evaluation, with the last one, which may be smaller."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
