"""Compares the memory that `rankwise plan` estimates with what training takes, on random models of real kinds.

    python benchmarks/memory.py            # all cases: a table, as in docs/memory.md
    python benchmarks/memory.py --fast     # the small cases, in a minute
    python benchmarks/memory.py --large    # large models: estimates only

Each case trains two steps with Transformers' Trainer in a process of its own, on the CPU. The measured value is the
peak of the resident memory, minus what the process held before the model was made. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 2
# Freed memory returns to the system at once, so that resident memory is memory in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """A model, an adapter, and how they train.

    Args:
        kind: ``bert``, ``llama`` or ``whisper``.
        sizes: fields of the model's configuration.
        size: the number of examples in a batch.
        length: the number of tokens in an example; for ``whisper`` in its transcript.
        training: keys of a recipe's training section.
        dtype: the dtype of the frozen weights.
        attention: ``sdpa`` or ``eager``.
        adapter: fields of the adapter's configuration.
        quantization: how the weights are packed, as in ``config.json``; only for estimates.
        fast: whether it is one of the small cases.
    """

    kind: str
    sizes: Mapping[str, Any]
    size: int
    length: int
    training: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    attention: str = "sdpa"
    adapter: Mapping[str, Any] = field(default_factory=lambda: {"init_r": 12, "target_r": 8})
    quantization: Mapping[str, Any] | None = None
    fast: bool = False


KINDS: dict[str, tuple[str, str, list[str]]] = {
    "bert": ("BertConfig", "AutoModelForSequenceClassification", ["query", "key", "value"]),
    "llama": ("LlamaConfig", "AutoModelForCausalLM", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "whisper": ("WhisperConfig", "AutoModelForSpeechSeq2Seq", ["q_proj", "k_proj", "v_proj"]),
}
BERT_SMALL = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
LLAMA_SMALL = dict(
    hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=688, vocab_size=8000
)
WHISPER_SMALL = dict(
    d_model=192, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=768, decoder_ffn_dim=768,
)  # fmt: skip
BERT_BASE: dict[str, Any] = {}
LLAMA_MEDIUM = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=32000
)
WHISPER_BASE = dict(
    d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8,
    encoder_ffn_dim=2048, decoder_ffn_dim=2048,
)  # fmt: skip
CHECKPOINTING = {"gradient_checkpointing": True}

CASES: dict[str, Case] = {
    "BERT, 5 million": Case("bert", BERT_SMALL, 8, 256, fast=True),
    "Llama, 7 million": Case("llama", LLAMA_SMALL, 4, 256),
    "Llama, 7 million, checkpointing": Case("llama", LLAMA_SMALL, 4, 256, CHECKPOINTING, fast=True),
    "Whisper, 13 million": Case("whisper", WHISPER_SMALL, 1, 64, fast=True),
    "BERT base": Case("bert", BERT_BASE, 4, 256),
    "BERT base, checkpointing": Case("bert", BERT_BASE, 4, 256, CHECKPOINTING),
    "BERT base, no dropout in attention": Case("bert", {"attention_probs_dropout_prob": 0.0}, 4, 256),
    "BERT base, eager attention": Case("bert", BERT_BASE, 4, 256, attention="eager"),
    "BERT base, bf16 mixed precision": Case("bert", BERT_BASE, 2, 256, {"bf16": True}),
    "Llama, 134 million": Case("llama", LLAMA_MEDIUM, 1, 512),
    "Llama, 134 million, checkpointing": Case("llama", LLAMA_MEDIUM, 1, 512, CHECKPOINTING),
    "Llama, 134 million, bfloat16 weights": Case("llama", LLAMA_MEDIUM, 1, 256, dtype="bfloat16"),
    "Llama, 134 million, SGD": Case("llama", LLAMA_MEDIUM, 1, 512, {"optim": "sgd"}),
    "Whisper base": Case("whisper", WHISPER_BASE, 1, 128),
    "Whisper base, checkpointing": Case("whisper", WHISPER_BASE, 1, 128, CHECKPOINTING),
}

WHISPER_LARGE = dict(
    d_model=1280, encoder_layers=32, decoder_layers=32, encoder_attention_heads=20, decoder_attention_heads=20,
    encoder_ffn_dim=5120, decoder_ffn_dim=5120, vocab_size=51866, num_mel_bins=128,
)  # fmt: skip
LLAMA_7B = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000,
    max_position_embeddings=4096,
)  # fmt: skip
MIXED = {**CHECKPOINTING, "bf16": True}
EIGHT_BIT = {"optim": "adamw_8bit"}
FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def whisper(size: int, dtype: str = "bfloat16", **training: Any) -> Case:
    """Whisper large-v3 as its users fine-tune it."""
    return Case("whisper", WHISPER_LARGE, size, 448, training, dtype, adapter={"init_r": 96, "target_r": 64})


def llama(size: int, dtype: str = "bfloat16", packed: Any = None, **training: Any) -> Case:
    """A language model of 7 billion parameters, adapted in all its linear layers."""
    adapter = {"init_r": 16, "target_r": 8, "target_modules": "all-linear"}
    return Case("llama", LLAMA_7B, size, 2048, training, dtype, adapter=adapter, quantization=packed)


LARGE: dict[str, dict[str, Case]] = {
    "Whisper large-v3, 8 clips of 30 seconds": {
        "float32": whisper(8, "float32"),
        "float32, checkpointing": whisper(8, "float32", **CHECKPOINTING),
        "float32, checkpointing, `bf16: true`": whisper(8, "float32", **MIXED),
        "bfloat16, checkpointing, `bf16: true`": whisper(8, **MIXED),
        "the same, `optim: adamw_8bit`": whisper(8, **MIXED, **EIGHT_BIT),
        "the same, 2 clips": whisper(2, **MIXED, **EIGHT_BIT),
    },
    "7B Llama, 1 text of 2,048 tokens": {
        "float32": llama(1, "float32"),
        "bfloat16": llama(1),
        "bfloat16, checkpointing": llama(1, **CHECKPOINTING),
        "the same, 4 texts": llama(4, **CHECKPOINTING),
        "bfloat16, checkpointing, `optim: adamw_8bit`": llama(1, **CHECKPOINTING, **EIGHT_BIT),
        "the same, 4-bit base": llama(1, packed=FOUR_BITS, **CHECKPOINTING, **EIGHT_BIT),
    },
}


def section(case: Case) -> Any:
    """The recipe's training section of a case."""
    from rankwise.recipes.recipe import TrainingSection

    training = {
        "max_steps": STEPS,
        "save_steps": None,
        "per_device_train_batch_size": case.size,
        **case.training,
    }
    return TrainingSection.model_validate(training)


def adapted_model(case: Case, device: str) -> Any:
    """The case's model with random weights and adapters."""
    import torch
    import transformers

    import rankwise as rw

    config_name, auto, targets = KINDS[case.kind]
    config = getattr(transformers, config_name)(**case.sizes)
    with torch.device(device):
        made = getattr(transformers, auto).from_config(
            config, dtype=getattr(torch, case.dtype), attn_implementation=case.attention
        )
    if case.quantization:
        config.quantization_config = dict(case.quantization)
    fields = {"target_modules": targets, "tinit": 0, "tfinal": 0, "total_step": STEPS, **case.adapter}
    return rw.get_peft_model(made, rw.AdaLoraConfig(**fields))


def largest_batch(case: Case, config: Any) -> Any:
    """The case's largest batch, on the meta device."""
    from rankwise.recipes.memory.batches import speech_batch, text_batch

    if case.kind == "whisper":
        return speech_batch(case.size, config, tokens=case.length)
    return text_batch(case.size, case.length, "classes" if case.kind == "bert" else "tokens")


def estimate(case: Case) -> Any:
    """The estimate of `rankwise plan`, with evaluation on batches of the same size."""
    from rankwise.recipes.memory.estimate import estimate_memory

    model = adapted_model(case, "meta")
    batch = largest_batch(case, model.config)
    return estimate_memory(model, batch, section(case), evaluation_batch=batch)


def measure(case: Case) -> int:
    """Train the case in this process. Return the bytes of its peak above what the process held before."""
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    warm_up = Case("bert", tiny, 1, 8, case.training)
    with tempfile.TemporaryDirectory() as folder:
        train(warm_up, folder)
        before = reset_peak()
        train(case, folder)
    return resident("VmHWM") - before


def train(case: Case, folder: str) -> None:
    """Train a case's model for two steps, as `rankwise train` does."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    model = adapted_model(case, "cpu")
    shapes = largest_batch(case, model.config)
    rows = [{name: values(name, each, model.config) for name, each in shapes.items()} for _ in range(STEPS)]
    dataset = [{name: row[name][i] for name in row} for row in rows for i in range(case.size)]
    for example in dataset:
        if "attention_mask" in example:
            example["attention_mask"][-1] = 0  # padding, so that attention needs a mask
    options = dict(case.training)
    if "gradient_checkpointing" in options:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=case.size,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def values(name: str, shape: Any, config: Any) -> Any:
    """Values for one of the batch's tensors."""
    import torch

    if name == "attention_mask":
        return torch.ones(shape.shape, dtype=shape.dtype)
    if shape.dtype.is_floating_point:
        return torch.randn(shape.shape)
    most = 2 if shape.dim() == 1 else config.vocab_size
    return torch.randint(0, most, shape.shape)


def reset_peak() -> int:
    """Reset the process's peak. Return the bytes that it holds now."""
    import ctypes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(key: str) -> int:
    """The bytes of the process's resident memory: now (``VmRSS``) or at its peak (``VmHWM``)."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("Measuring needs Linux: /proc/self/status has no VmHWM.")
    return int(found[1]) * 1024


def measured(*names: str) -> dict[str, int]:
    """Measure cases one after the other in a fresh process."""
    command = [sys.executable, __file__, "--measure", *names]
    result = subprocess.run(command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{', '.join(names)}:\n{result.stderr}")
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def print_large() -> None:
    """Print tables of the memory that large models take."""
    from rankwise.recipes.memory.estimate import readable

    columns = ("settings", "weights", "training state", "activations", "together", "in evaluation")
    for model, cases in LARGE.items():
        print(f"\n{model}\n\n| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
        for settings, case in cases.items():
            found = estimate(case)
            weights, activations = sum(found.weights.values()), found.activations or 0
            trains = found.training - weights - activations
            sizes = (weights, trains, activations, found.training, found.evaluating)
            print(f"| {settings} | {' | '.join(map(readable, sizes))} |", flush=True)
            print(*found.notes, sep="\n", end="", file=sys.stderr)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases; none for all")
    parser.add_argument("--large", action="store_true", help="what large models would take")
    parser.add_argument("--fast", action="store_true", help="the small ones only")
    parser.add_argument(
        "--measure", action="store_true", help="measure in this process, and print bytes as JSON"
    )
    options = parser.parse_args()
    if options.measure:
        print(json.dumps({name: measure(CASES[name]) for name in options.cases}))
        return
    if options.large:
        print_large()
        return
    names = options.cases or [name for name, case in CASES.items() if case.fast or not options.fast]
    print("| model | batch | estimated | measured | estimated / measured |\n| --- | --- | --- | --- | --- |")
    for name in names:
        case = CASES[name]
        told, real = estimate(case).training, measured(name)[name]
        sizes = [f"{size / 2**20:,.0f} MiB" for size in (told, real)]
        shape = f"{case.size} x {case.length}" if case.kind != "whisper" else f"{case.size} x 30 s"
        print(f"| {name} | {shape} | {' | '.join(sizes)} | {told / real:.2f} |", flush=True)


if __name__ == "__main__":
    main()
