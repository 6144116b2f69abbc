"""What a training step costs: PEFT's LoRA and AdaLoRA against rankwise's, on random models of real shapes.

    python benchmarks/speed.py                    # both models, a table for each
    python benchmarks/speed.py --models minilm --rounds 30 --threads 2

A step is forward, backward, the optimizer's step and all that the method wants between. All adapters take turns in one
process, and every time is divided by that of the frozen model in the same round (forward, and backward down to its
embeddings), so that what else the machine does falls on all. The table has the medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
Step = Callable[[Batch], None]
RANK, SPARE = 8, 12
LONG = 1_000_000  # steps: a schedule that stays in its phase for as long as is measured
FLOOR = "frozen model"


def minilm() -> tuple[Any, Batch, list[str]]:
    """A BERT of MiniLM's shape, 16 sentences of 24 tokens, all six linear maps of a layer."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    ids = torch.randint(5, 30_000, (16, 24))
    targets = [
        "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
    ]  # fmt: skip
    batch = {"input_ids": ids, "labels": torch.randint(0, 2, (16,))}
    return BertForSequenceClassification(config), batch, targets


def smollm2() -> tuple[Any, Batch, list[str]]:
    """A Llama of SmolLM2-135M's shape, 4 texts of 64 tokens, all seven projections."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49_152, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.randint(5, 49_000, (4, 64))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}, targets


MODELS = {"minilm": minilm, "smollm2": smollm2}


def frozen(model: Any, targets: list[str]) -> Step:
    """No adapter at all: what any of them must take."""
    model.requires_grad_(False)
    model.enable_input_require_grads()

    def step(batch: Batch) -> None:
        model(**batch).loss.backward()

    return step


def plain(model: Any) -> Step:
    """An ordinary step with all that trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(batch: Batch) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_lora(model: Any, targets: list[str]) -> Step:
    """PEFT's LoRA."""
    import peft

    return plain(
        peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    )


def peft_adalora(model: Any, targets: list[str]) -> Step:
    """In the phase that prunes, every ten steps, as its documentation shows: with the penalty and the allocation."""
    import peft

    config = peft.AdaLoraConfig(
        init_r=SPARE, target_r=RANK, tinit=1, tfinal=10, deltaT=10, total_step=LONG, lora_alpha=2 * RANK,
        target_modules=targets,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config).base_model  # which adds the penalty, task type or not
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    steps = iter(range(2, LONG))

    def step(batch: Batch) -> None:
        adapted(**batch).loss.backward()
        optimizer.step()
        with torch.no_grad():
            adapted.update_and_allocate(next(steps))
        optimizer.zero_grad()

    return step


def rankwise_lora(model: Any, targets: list[str]) -> Step:
    """LoRA in rankwise."""
    import rankwise

    return plain(
        rankwise.get_peft_model(
            model, rankwise.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
        )
    )


def _adalora(model: Any, targets: list[str], **fields: Any) -> Any:
    import rankwise

    config = rankwise.AdaLoraConfig(
        init_r=SPARE, target_r=RANK, tinit=1, tfinal=10, deltaT=10, total_step=LONG, lora_alpha=2 * RANK,
        target_modules=targets, **fields,
    )  # fmt: skip
    return rankwise.get_peft_model(model, config)


def rankwise_pruning(model: Any, targets: list[str]) -> Step:
    """In the phase that prunes, with all spare ranks still there: the dearest."""
    return plain(_adalora(model, targets))


def rankwise_pruned(model: Any, targets: list[str]) -> Step:
    """In the final phase."""
    adapted = _adalora(model, targets)
    adapted.finalize_ranks()
    return plain(adapted)


def rankwise_paper(model: Any, targets: list[str]) -> Step:
    """The paper's form, in the phase that prunes."""
    return plain(_adalora(model, targets, init_lora_weights=True, orth_reg_weight=0.5))


ADAPTERS: dict[str, Callable[[Any, list[str]], Step]] = {
    FLOOR: frozen,
    f"PEFT LoRA, r {RANK}": peft_lora,
    f"PEFT AdaLoRA, {SPARE} to {RANK}, pruning": peft_adalora,
    f"rankwise LoRA, r {RANK}": rankwise_lora,
    f"rankwise AdaLoRA, {SPARE} to {RANK}, pruning": rankwise_pruning,
    f"rankwise AdaLoRA, {SPARE} to {RANK}, final phase": rankwise_pruned,
    f"rankwise, the paper's form, {SPARE} to {RANK}, pruning": rankwise_paper,
}


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by adapter; the first three rounds, in which memory is first taken, are left out."""
    steps: dict[str, Step] = {}
    for adapter, attach in ADAPTERS.items():
        torch.manual_seed(0)
        model, batch, targets = MODELS[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps[adapter] = attach(model, targets)
    found: dict[str, list[float]] = {adapter: [] for adapter in ADAPTERS}
    for number in range(rounds + 3):
        for adapter in _rotated(list(ADAPTERS), number):
            started = time.perf_counter()
            steps[adapter](batch)
            if number >= 3:
                found[adapter].append(time.perf_counter() - started)
    return found


def _rotated(names: list[str], by: int) -> Iterator[str]:
    """Each round begins with another one, so that none always comes after the same."""
    yield from names[by % len(names) :]
    yield from names[: by % len(names)]


def table(found: dict[str, list[float]]) -> str:
    """Markdown: the median ratio to the frozen model, and its quartiles."""
    lines = ["| | times the frozen model's step | middle half of the rounds |", "| --- | --- | --- |"]
    for adapter, seconds in found.items():
        ratios = [mine / floor for mine, floor in zip(seconds, found[FLOOR], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f"| {adapter} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=40, help="measured steps of each adapter, at least 2")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if asked.rounds < 2:
        parser.error(f"--rounds must be at least 2, not {asked.rounds}")
    torch.set_num_threads(asked.threads)
    for name in asked.models:
        found = measure(name, asked.rounds)
        floor = statistics.median(found[FLOOR])
        print(
            f"\n### {(MODELS[name].__doc__ or name).rstrip('.')}\n\nThe frozen model's step: {floor:.3f} s.\n"
        )
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
