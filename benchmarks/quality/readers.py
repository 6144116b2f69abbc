"""Small Llamas that learn to read before a task begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_SIZE, _RATE = 16, 3e-3


def read_blocks(new: Callable[[], nn.Module], blocks: Callable[[], Tensor], file: Path, steps: int) -> Path:
    """The file with the weights of a model that has learnt the next token of blocks; it is made if there is none.

    Args:
        new: makes the model.
        blocks: the numbers of the tokens to learn from, (blocks, length).
        file: where the weights are kept.
        steps: how many batches of 16 blocks the model sees.
    """
    if not file.exists():
        torch.manual_seed(0)
        model, texts = new(), blocks()
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
        decay = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 50, (steps - step) / (steps - 50))
        )
        for _ in range(steps):
            rows = texts[torch.randint(len(texts), (_SIZE,))]
            model(input_ids=rows, labels=rows).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
        made = file.with_suffix(".tmp")
        torch.save(model.state_dict(), made)
        made.replace(file)
    return file
