"""The trainer of all recipes: Transformers' Trainer, which evaluates all held-out examples with the model's loss."""

from __future__ import annotations

from typing import Any

from transformers import Trainer


class RecipeTrainer(Trainer):
    """Evaluates all examples. ``dataloader_drop_last`` and ``label_smoothing_factor`` apply to training only."""

    label_smoother: Any  # None: the loss is the model's own

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of an evaluation, with the last one, which may be smaller."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the model's own loss, so that runs with different label smoothing can be compared."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.label_smoother = smoother
