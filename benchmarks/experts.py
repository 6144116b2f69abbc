"""The cost of a training step on experts: PEFT's LoRA with ``target_parameters`` against rankwise's, at one rank.

    python benchmarks/experts.py                       # a mixture of 8 experts and one of 32, a table for each
    python benchmarks/experts.py --models many --rank 8 --rounds 10

A step is forward, backward and the optimizer's step, on random models of Transformers' own classes. The adapters take
turns in one process, so that other work on the machine affects all of them. Times are medians over the rounds. Memory
is the size of all living tensors that operations have made: the largest at any moment of a step, in addition to
weights, gradients and optimizer state.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES: dict[str, dict[str, Any]] = {
    "few": {"num_local_experts": 8, "intermediate_size": 1024},
    "many": {"num_local_experts": 32, "intermediate_size": 256},
}


def mixture(name: str, implementation: str) -> Any:
    """A Mixtral with random weights: four layers of width 512, mostly experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, vocab_size=2048,
        num_experts_per_tok=2, **SIZES[name],
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.set_experts_implementation(implementation)
    return model


def by_peft(model: Any, rank: int) -> Any:
    """PEFT's LoRA."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=[], target_parameters=EXPERTS))


def by_rankwise(model: Any, rank: int) -> Any:
    """LoRA in rankwise, with the same settings."""
    import rankwise as rw

    return rw.get_peft_model(model, rw.LoraConfig(r=rank, target_modules=[], target_parameters=EXPERTS))


def by_adalora(model: Any, rank: int) -> Any:
    """AdaLoRA before its first cut, with twice the ranks."""
    import rankwise as rw

    config = rw.AdaLoraConfig(
        init_r=2 * rank, target_r=rank, total_step=10**6, target_modules=[], target_parameters=EXPERTS
    )
    return rw.get_peft_model(model, config)


METHODS: dict[str, Callable[[Any, int], Any]] = {
    "PEFT LoRA": by_peft,
    "rankwise LoRA": by_rankwise,
    "rankwise AdaLoRA, twice the rank": by_adalora,
}


class Turn:
    """One adapter on its own copy of the model, and its optimizer."""

    def __init__(self, name: str, model: Any, tokens: torch.Tensor) -> None:
        self.name, self.model, self.tokens = name, model, tokens
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.seconds: list[float] = []
        self.peak = 0

    def step(self) -> None:
        """Take one step."""
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> None:
        """Take one step and record its time."""
        start = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - start)

    def measured(self) -> None:
        """Take one step and record the memory of its tensors."""
        from rankwise.recipes.memory.activations import LiveBytes

        with LiveBytes([*self.model.parameters(), *self.model.buffers()]) as live:
            self.step()
        self.peak = live.peak


def compare(name: str, implementation: str, rank: int, rounds: int, tokens: int) -> None:
    """Print the table of one model."""
    ids = torch.randint(0, 2048, (1, tokens), generator=torch.Generator().manual_seed(0))
    turns = []
    for method, adapt in METHODS.items():
        torch.manual_seed(0)
        turns.append(Turn(method, adapt(mixture(name, implementation), rank), ids))
    for turn in turns:
        turn.step()
        turn.measured()
    for _ in range(rounds):
        for turn in turns:
            turn.timed()
    held = sum(p.numel() * 4 for n, p in turns[0].model.named_parameters() if n.endswith("_proj"))
    sizes = ", ".join(f"{key}={value}" for key, value in SIZES[name].items())
    print(f"{name}: {sizes}, {implementation}, rank {rank}, {tokens} tokens; experts {held / 1e6:.0f} MB")
    print(f"{'':34}{'trained':>10}{'step':>10}{'memory':>11}")
    for turn in turns:
        median = 1000 * statistics.median(turn.seconds)
        print(f"{turn.name:34}{turn.trained:>10,}{median:>7.0f} ms{turn.peak / 1e6:>8.0f} MB")


def main() -> None:
    """Run the comparisons that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument(
        "--implementation", default="grouped_mm", choices=["grouped_mm", "batched_mm", "eager"]
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for name in options.models:
        compare(name, options.implementation, options.rank, options.rounds, options.tokens)


if __name__ == "__main__":
    main()
