"""TRL's trainers on tiny random models, with a tokenizer and data that are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiny import WORDS, llama, words_tokenizer

STEPS = 8
ROWS = 32
NEEDS_A_REFERENCE = ("dpo", "kto", "grpo", "rloo")
TRAINERS = ("sft", *NEEDS_A_REFERENCE, "reward")
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 3, "bf16": False,
}  # fmt: skip


def text(first: int, words: int = 3) -> str:
    return " ".join(WORDS[(first + n) % len(WORDS)] for n in range(words))


def data(kind: str) -> Any:
    from datasets import Dataset

    rows = range(ROWS)
    better, worse = [f" {text(n + 1)}" for n in rows], [f" {text(n + 5)}" for n in rows]
    prompt = {"prompt": [text(n) for n in rows]}
    columns = {
        "sft": {"text": [text(n, 6) for n in rows]},
        "dpo": {**prompt, "chosen": better, "rejected": worse},
        "kto": {**prompt, "completion": better, "label": [n % 2 == 0 for n in rows]},
        "grpo": prompt,
        "rloo": prompt,
        "reward": {"chosen": better, "rejected": worse},
    }
    return Dataset.from_dict(columns[kind])


def judge() -> nn.Module:
    """A model that gives a number to a text, with a new head."""
    from transformers import LlamaForSequenceClassification

    config: Any = llama().config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def base_for(kind: str) -> nn.Module:
    return judge() if kind == "reward" else llama()


def count_words(completions: list[str], **unused: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(len(text.split()) + text.count("a")) for text in completions]


def trl_trainer(kind: str, folder: Path, model: Any = None, *, ref_model: Any = None, peft_config: Any = None,
                callbacks: Any = (), **arguments: Any) -> Any:  # fmt: skip
    """One of TRL's trainers, by its name in `TRAINERS`."""
    import trl

    name = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO", "reward": "Reward"}[
        kind
    ]
    own: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if kind in ("grpo", "rloo"):
        own = {"num_generations": 4, "max_completion_length": 5, "beta": 0.1}
        options["reward_funcs"] = count_words
    else:
        own = {"max_length": 16}
    if ref_model is not None:
        options["ref_model"] = ref_model
    return getattr(trl, f"{name}Trainer")(
        base_for(kind) if model is None else model,
        args=getattr(trl, f"{name}Config")(str(folder), **{**ARGUMENTS, **own, **arguments}),
        train_dataset=data(kind),
        processing_class=words_tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
        **options,
    )


def logged(trainer: Any, name: str) -> list[float]:
    """The values that a trainer has logged under a name, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
