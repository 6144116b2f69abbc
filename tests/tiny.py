"""Small random models and data that tests share: real architectures, no downloads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

WORDS = "a cat sat on the mat while dogs ran far away".split()


@contextmanager
def told() -> Iterator[list[str]]:
    """A list of the warnings given in the context. It is filled when the context ends."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(each.message) for each in caught if issubclass(each.category, UserWarning)]


def llama(seed: int = 0, **changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def bert(seed: int = 0, labels: int = 3, **changes: object) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "num_labels": labels,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return BertForSequenceClassification(BertConfig(**{**sizes, **changes}))


def token_batches(
    count: int, seed: int = 1, size: int = 4, length: int = 12
) -> list[dict[str, torch.Tensor]]:
    """Sequences in which every token follows from the previous one, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        columns = [torch.randint(0, 8, (size,), generator=generator)]
        for _ in range(length - 1):
            columns.append((columns[-1] * 3 + 1) % 8)
        ids = torch.stack(columns, 1)
        batches.append({"input_ids": ids, "labels": ids.clone()})
    return batches


def mix_ranks(adapted: Any, rank_of: Callable[[int, str], int], std: float = 0.3, seed: int = 3) -> None:
    """Give an AdaLoRA adapter visible weights, and each layer a rank that depends on its number and path."""
    adapted.finalize_ranks()
    controller = adapted._rankwise_controller
    generator = torch.Generator().manual_seed(seed)
    init_r = adapted.peft_config["default"].init_r
    kept = {}
    for number, (path, layer) in enumerate((pair.path, pair.layer) for pair in controller.factors.pairs):
        for parameter in layer.adapter_parameters("default").values():
            parameter.data.normal_(std=std, generator=generator)
        blocks = range(len(layer.lora_A["default"]) // init_r)  # experts: one block each
        kept[path] = torch.cat([torch.arange(init_r) < rank_of(number + block, path) for block in blocks])
        layer.lora_A["default"].data[~kept[path]] = 0
        layer.lora_B["default"].data[:, ~kept[path]] = 0
    controller.take_over(kept)


def words_tokenizer() -> Any:
    """A tokenizer that knows `WORDS`. It ends sequences with "[SEP]"."""
    from transformers import BertTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    return BertTokenizerFast(vocab=vocabulary, eos_token="[SEP]")


def fresh_accelerator(**options: Any) -> Any:
    """An ``Accelerator`` that knows nothing of those before it in this process.

    A loader that an earlier test left in the middle would otherwise end the accumulation of gradients early.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)
