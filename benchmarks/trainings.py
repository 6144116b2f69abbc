"""The trainings of the speed benchmarks: random models of real shapes, settings, PEFT's and rankwise's adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
STEPS_TO_A_CUT = 11  # with the schedules below
LONG = 1_000_000  # optimizer steps: a schedule that stays in its phase throughout the measurement


# --- models --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A random model of some shape, a batch for it, and the names of the layers to adapt."""

    title: str
    make: Callable[[], tuple[nn.Module, Batch]]
    targets: Sequence[str]


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _bert() -> tuple[nn.Module, Batch]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    batch = {"input_ids": torch.randint(5, 30_000, (16, 24)), "labels": torch.randint(0, 2, (16,))}
    return BertForSequenceClassification(config), batch


def _llama(size: int, length: int, **sizes: Any) -> tuple[nn.Module, Batch]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes)
    ids = torch.randint(5, config.vocab_size - 5, (size, length))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def small(layers: int = 4, width: int = 256) -> Model:
    """A Llama of any depth and width. Its batch is 2 texts of 128 tokens; all seven projections are adapted."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "vocab_size": 1000,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return Model(f"{layers} layers of width {width}", partial(_llama, 2, 128, **sizes, **heads), LLAMA)


MINILM = Model(
    "A BERT of MiniLM's shape, 16 sentences of 24 tokens, all six linear maps of a layer",
    _bert,
    ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
)
SMOLLM2 = Model(
    "A Llama of SmolLM2-135M's shape, 4 texts of 64 tokens, all seven projections",
    partial(
        _llama, 4, 64, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49_152, tie_word_embeddings=True,
    ),
    LLAMA,
)  # fmt: skip
LLAMA_1B = Model(
    "A Llama of Llama 3.2 1B's shape, 4 texts of 512 tokens, all seven projections",
    partial(
        _llama, 4, 512, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=True,
    ),
    LLAMA,
)  # fmt: skip
TINY = Model(
    "A Llama of 24 layers of width 32, one text of 4 tokens, all seven projections",
    partial(
        _llama, 1, 4, hidden_size=32, intermediate_size=64, num_hidden_layers=24, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=100,
    ),
    LLAMA,
)  # fmt: skip
MODELS = {"minilm": MINILM, "smollm2": SMOLLM2, "llama-1b": LLAMA_1B, "tiny": TINY}


def in_4_bit(model: nn.Module, targets: Sequence[str]) -> nn.Module:
    """Pack the adapted layers with bitsandbytes, and cast the others to bfloat16."""
    import bitsandbytes

    model.bfloat16()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path.endswith(tuple(targets)):
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                torch.bfloat16,
                quant_type="nf4",
            )
            packed.load_state_dict(layer.state_dict())
            model.set_submodule(path, packed)
    return model


# --- settings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How a model trains."""

    precision: str = "float32"
    device: str = "cpu"
    checkpointing: str | None = None  # "re-entrant" or "not re-entrant"
    compiled: bool = False
    processes: bool = False
    rank: int = 8  # of LoRA, and of AdaLoRA at its end
    spare: int = 12  # of AdaLoRA at its start

    def model(self, made: nn.Module, targets: Sequence[str]) -> nn.Module:
        """Prepare ``made`` before an adapter is attached."""
        if self.precision == "4-bit":
            made = in_4_bit(made, targets)
        elif self.precision.startswith("bfloat16"):
            made = made.bfloat16()
        if self.checkpointing:
            options = {"use_reentrant": self.checkpointing == "re-entrant"}
            made.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
        return made.to(self.device).train()

    def forward(self, adapted: nn.Module) -> Callable[..., Any]:
        """The function to call for a forward pass."""
        if self.compiled:
            return torch.compile(adapted)
        if self.processes and any(parameter.requires_grad for parameter in adapted.parameters()):
            return nn.parallel.DistributedDataParallel(adapted)
        return adapted


PRECISIONS = ("float32", "bfloat16", "float32, autocast", "4-bit")


# --- adapters ------------------------------------------------------------------------------------------------------


class Training:
    """A model in training."""

    ranks: Any = None  # the handle of `rankwise.adapt_ranks`, if it adapts the model's ranks

    def __init__(self, adapted: Any, batch: Batch, setting: Setting, trains: bool = True) -> None:
        self.model, self.setting = adapted, setting
        self.batch = {name: tensor.to(setting.device) for name, tensor in batch.items()}
        self.forward = setting.forward(adapted)
        parameters = [p for p in adapted.parameters() if p.requires_grad] if trains else []
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    def gradients(self) -> None:
        """Run a forward and a backward pass."""
        half = self.setting.precision.endswith("autocast")
        with torch.autocast(self.setting.device, dtype=torch.bfloat16) if half else nullcontext():
            loss = self.forward(**self.batch).loss
        loss.backward()

    def step(self) -> None:
        """Take a whole step."""
        self.gradients()
        if self.optimizer is not None:
            self.optimizer.step()
            self.between()
            self.optimizer.zero_grad()

    def between(self) -> None:
        """Call what the method needs after the optimizer's step."""


class PeftAdaLora(Training):
    """PEFT's AdaLoRA as its documentation shows it, with penalty and allocation, pruning every ten steps."""

    number = 1

    def between(self) -> None:
        self.number += 1
        with torch.no_grad():
            self.model.update_and_allocate(self.number)


def frozen(model: Any, batch: Batch, targets: list[str], setting: Setting) -> Training:
    """No adapter: the cost that every training has."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return Training(model, batch, setting, trains=False)


def peft_lora(model: Any, batch: Batch, targets: list[str], setting: Setting) -> Training:
    """PEFT's LoRA."""
    import peft

    config = peft.LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules=targets)
    return Training(peft.get_peft_model(model, config), batch, setting)


def peft_lora_sped_up(model: Any, batch: Batch, targets: list[str], setting: Setting) -> Training:
    """PEFT's LoRA with rankwise's computation under its layers."""
    import rankwise

    training = peft_lora(model, batch, targets, setting)
    rankwise.speed_up(training.model)
    return training


def peft_lora_adapting(
    model: Any, batch: Batch, targets: list[str], setting: Setting, **schedule: Any
) -> Training:
    """PEFT's LoRA, whose ranks rankwise adapts, in the pruning phase with all spare ranks."""
    import rankwise

    training = peft_lora(model, batch, targets, replace(setting, rank=setting.spare))
    schedule = {"tinit": 1, "tfinal": 10, "deltaT": 10, "total_step": LONG, **schedule}
    training.ranks = rankwise.adapt_ranks(training.model, target_r=setting.rank, **schedule)
    return training


def peft_adalora(model: Any, batch: Batch, targets: list[str], setting: Setting) -> Training:
    """PEFT's AdaLoRA."""
    import peft

    config = peft.AdaLoraConfig(
        init_r=setting.spare, target_r=setting.rank, tinit=1, tfinal=10, deltaT=10, total_step=LONG,
        lora_alpha=2 * setting.rank, target_modules=targets,
    )  # fmt: skip
    # it adds the penalty, whether a task type is set or not
    adapted = peft.get_peft_model(model, config).base_model
    return PeftAdaLora(adapted, batch, setting)


def rankwise_lora(model: Any, batch: Batch, targets: list[str], setting: Setting) -> Training:
    """LoRA in rankwise."""
    import rankwise

    config = rankwise.LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules=targets)
    return Training(rankwise.get_peft_model(model, config), batch, setting)


def rankwise_adalora(
    model: Any, batch: Batch, targets: list[str], setting: Setting, final: bool = False, **form: Any
) -> Training:
    """AdaLoRA in rankwise: in the pruning phase with all spare ranks, which costs most, or in the final phase."""
    import rankwise

    fields = dict(
        init_r=setting.spare, target_r=setting.rank, tinit=1, tfinal=10, deltaT=10, total_step=LONG,
        lora_alpha=2 * setting.rank, target_modules=targets,
    )  # fmt: skip
    config = rankwise.AdaLoraConfig(**{**fields, **form})
    adapted = rankwise.get_peft_model(model, config)
    if final:
        adapted.finalize_ranks()
    return Training(adapted, batch, setting)


def training_of(attach: Callable[..., Training], model: Model, setting: Setting) -> Training:
    """A new model in training with one of the adapters below. Each call gives the same model."""
    torch.manual_seed(0)
    with torch.device(setting.device):  # on a CPU, making large models takes long
        made, batch = model.make()
    targets = list(model.targets)
    return attach(setting.model(made, targets), batch, targets, setting)


FLOOR = "frozen model"
MAIN: dict[str, Callable[..., Training]] = {
    FLOOR: frozen,
    "PEFT LoRA": peft_lora,
    "PEFT LoRA, speed_up": peft_lora_sped_up,
    "rankwise LoRA": rankwise_lora,
    "rankwise AdaLoRA, pruning": rankwise_adalora,
    "rankwise AdaLoRA, final phase": partial(rankwise_adalora, final=True),
}
ALL = {
    **MAIN,
    "PEFT AdaLoRA, pruning": peft_adalora,
    "rankwise, the paper's form, pruning": partial(
        rankwise_adalora, init_lora_weights=True, orth_reg_weight=0.5
    ),
}
