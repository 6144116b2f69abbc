"""Estimating the memory of training from shapes alone, without weights, data or computation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rankwise.attach.attachment import adapter_layers, saved_modules
from rankwise.attach.embeddings import output_embeddings
from rankwise.recipes.recipe import TrainingSection

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from torch import Tensor, nn

_ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Memory:
    """The memory of training at its peak, in bytes, for each process and so for each GPU.

    Args:
        weights: bytes of the frozen base model and its buffers, by dtype or packing.
        adapters: bytes of A, B, E and trained biases, at the ranks of the start.
        modules_to_save: bytes of the copies of modules that train in full.
        gradients: bytes of all gradients.
        optimizer: bytes of the optimizer's state.
        run_state: bytes of AdaLoRA's importance scores and masks.
        buckets: bytes of the copies of the gradients that DistributedDataParallel sends. 0 for one process.
        activations: bytes that forward and backward hold at the peak, in addition to all of the above. None: unknown.
        evaluation: bytes that an evaluation's forward pass holds instead of gradients and activations. None: unknown.
        processes: the number of training processes. Each needs all of this memory.
        batch: the names and shapes of the training batch.
        evaluation_batch: the names and shapes of the evaluation batch.
        notes: notes for the user about memory that could not be counted, one sentence each.
    """

    weights: Mapping[str, int]
    adapters: int
    modules_to_save: int
    gradients: int
    optimizer: int
    run_state: int
    buckets: int
    activations: int | None
    evaluation: int | None
    processes: int
    batch: Mapping[str, tuple[int, ...]]
    evaluation_batch: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()

    @property
    def training(self) -> int:
        """All bytes of one process while it trains."""
        return sum(size for _, size in self.parts())

    @property
    def evaluating(self) -> int:
        """All bytes of one process while it evaluates."""
        return self.training - self.gradients - (self.activations or 0) + (self.evaluation or 0)

    @property
    def total(self) -> int:
        """The larger of `training` and `evaluating`, in bytes."""
        return max(self.training, self.evaluating)

    def parts(self) -> Iterator[tuple[str, int]]:
        """The parts of the memory in training that are not 0: a name to show, and bytes."""
        yield from ((f"base weights, {dtype}", size) for dtype, size in self.weights.items())
        named = (
            ("adapters", self.adapters),
            ("modules trained in full", self.modules_to_save),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer),
            ("importance of ranks", self.run_state),
            ("DDP's buckets", self.buckets),
            (_ACTIVATIONS, self.activations or 0),
        )
        yield from ((name, size) for name, size in named if size)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        where = "" if self.processes == 1 else f"in each of {self.processes} processes, "
        yield Text(
            f"memory: {where}about {readable(self.training)} in training"
            + (f", {readable(self.evaluating)} in evaluation" if self.evaluation is not None else ""),
            style="bold",
        )
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for name, size in self.parts():
            table.add_row(name, readable(size), _shapes(self.batch) if name == _ACTIVATIONS else "")
        if self.evaluation is not None:
            shapes = f"in place of gradients and activations, {_shapes(self.evaluation_batch)}"
            table.add_row("evaluation", readable(self.evaluation), shapes)
        yield table
        yield Text("for the longest examples that the recipe allows; shorter ones take less", style="dim")
        for note in self.notes:
            yield Text(note, style="yellow")

    def to_dict(self) -> dict[str, Any]:
        """The estimate as data for JSON, in bytes."""
        batches = {"batch": self.batch, "evaluation_batch": self.evaluation_batch}
        return {
            **asdict(self),
            **{key: {name: list(shape) for name, shape in batch.items()} for key, batch in batches.items()},
            "total": {"training": self.training, "evaluation": self.evaluating},
            "notes": list(self.notes),
        }


def _shapes(batch: Mapping[str, tuple[int, ...]]) -> str:
    return "for " + ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in batch.items())


def readable(size: float) -> str:
    """A number of bytes as text.

    Example:
        >>> readable(3_300_000_000), readable(5_000_000), readable(128)
        ('3.07 GiB', '5 MiB', '128 B')
    """
    for unit, name, style in ((2**30, "GiB", ".2f"), (2**20, "MiB", ".0f"), (2**10, "KiB", ".0f")):
        if size >= unit:
            return f"{size / unit:{style}} {name}"
    return f"{size:.0f} B"


def estimate_memory(
    model: Any,
    batch: Mapping[str, Tensor] | None,
    training: TrainingSection,
    processes: int = 1,
    evaluation_batch: Mapping[str, Tensor] | None = None,
) -> Memory:
    """Estimate the memory that training an adapted model takes.

    Args:
        model: the adapted model on the meta device, in the dtypes of training. It can't be used afterwards.
        batch: the largest training batch of a process, labels included, or None if it is unknown.
        training: the recipe's section ``training``: optimizer, precision, checkpointing and accumulation.
        processes: the number of training processes.
        evaluation_batch: the largest batch in evaluation, or None if it is unknown.
    """
    notes: list[str] = []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = sum(map(_bytes, trained.values()))
    whole = sum(_bytes(parameter) for name, parameter in trained.items() if ".modules_to_save." in name)
    gates = sum(_bytes(factor) for factor in _factors(model) if not factor.requires_grad)
    adapters = gradients - whole + gates
    weights, unpacked = frozen_bytes(model, notes)
    run_state = sum(_bytes(buffer) for name, buffer in model.named_buffers() if name.startswith("rankwise_"))
    optimizer = _optimizer_bytes(training.optim, [tuple(p.shape) for p in trained.values()], notes)
    peak, evaluation = _peaks(model, batch, evaluation_batch, training, notes)
    activations = None
    if peak is not None:
        # Between backward and the next forward pass, penalty and scores make a few copies of the factors.
        activations = max(peak + unpacked - gradients, 3 * adapters if run_state else 0, 0)
    return Memory(
        weights=weights,
        adapters=adapters,
        modules_to_save=whole,
        gradients=gradients,
        optimizer=optimizer,
        run_state=run_state,
        buckets=gradients if processes > 1 else 0,
        activations=activations,
        evaluation=None if evaluation is None else evaluation + unpacked,
        processes=processes,
        batch=_shapes_of(batch),
        evaluation_batch=_shapes_of(evaluation_batch),
        notes=tuple(notes),
    )


def _shapes_of(batch: Mapping[str, Tensor] | None) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in (batch or {}).items()}


def _peaks(
    model: Any,
    batch: Mapping[str, Tensor] | None,
    evaluation_batch: Mapping[str, Tensor] | None,
    training: TrainingSection,
    notes: list[str],
) -> tuple[int | None, int | None]:
    """The peaks in training (gradients included) and in evaluation, in bytes. None: unknown."""
    import torch

    from rankwise.recipes.memory.activations import FakeRun

    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    run = FakeRun(model, autocast)
    peak = evaluation = None
    try:
        if batch is not None:
            checkpointing, steps = training.gradient_checkpointing, training.gradient_accumulation_steps
            peak = run.training_peak(batch, checkpointing=checkpointing, accumulates=steps > 1)
        if evaluation_batch is not None:
            evaluation = run.evaluation_peak(evaluation_batch)
    except Exception as error:  # a model may do anything in its forward; the rest of the estimate stands
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        notes.append(f"The estimate lacks the activations of {type(model).__name__}: {reason}")
    return peak, evaluation


# --- the frozen model --------------------------------------------------------------------------------------------


def frozen_bytes(model: Any, notes: list[str] | None = None) -> tuple[dict[str, int], int]:
    """The bytes of the frozen weights and buffers, by dtype, after loading.

    The model's ``quantization_config`` says how its linear layers will be packed, although they are not packed on the
    meta device. The output layer and layers that train in full are never packed.

    Args:
        model: the adapted model.
        notes: the list to which a sentence is added if the packing is unknown.

    Returns:
        The bytes by the name of the dtype or packing, and the bytes of the largest packed weight when it is unpacked.
        Layers are unpacked one after the other.
    """
    name, bits, extra = _packing(_quantization(model), notes if notes is not None else [])
    packed = _packed_weights(model) if name else {}
    factors = set(map(id, _factors(model)))
    sizes: dict[str, int] = {}
    unpacked = 0
    for parameter in _distinct(model):
        if parameter.requires_grad or id(parameter) in factors:
            continue
        size, kind = _bytes(parameter), str(parameter.dtype).removeprefix("torch.")
        if id(parameter) in packed:
            unpacked = max(unpacked, size)
            size, kind = math.ceil(parameter.numel() * (bits / 8 + extra)), name
        sizes[kind] = sizes.get(kind, 0) + size
    return dict(sorted(sizes.items(), key=lambda item: -item[1])), unpacked


def _factors(model: nn.Module) -> Iterator[nn.Parameter]:
    """The factors A, B and E of all layers, trained or not."""
    for layer in adapter_layers(model).values():
        for adapter in layer.lora_A:
            yield from layer.adapter_parameters(adapter).values()


def _distinct(model: nn.Module) -> Iterator[Tensor]:
    """The model's parameters and buffers, without AdaLoRA's state. Tied ones are listed once."""
    yield from model.parameters()
    yield from (buffer for name, buffer in model.named_buffers() if not name.startswith("rankwise_"))


def _quantization(model: Any) -> dict[str, Any]:
    config = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    return dict(config if isinstance(config, Mapping) else config.to_dict())


def _packing(config: Mapping[str, Any], notes: list[str]) -> tuple[str, float, float]:
    """The packing's name, its bits per weight, and the additional bytes per weight for its scales."""
    if not config:
        return "", 0, 0
    method = str(config.get("quant_method", "")).rpartition(".")[2].lower()
    if config.get("load_in_4bit"):
        # 64 weights share a scale: a float32, or 8 bits if scales are quantized, too (256 of them share a float32).
        scale = 1 + 4 / 256 if config.get("bnb_4bit_use_double_quant") else 4
        return "4 bits packed", 4, scale / 64
    if config.get("load_in_8bit"):
        return "8 bits packed", 8, 0
    bits, group = config.get("bits"), config.get("group_size")
    if isinstance(bits, int) and method in ("gptq", "awq"):
        # A group of weights in a column shares a float16 scale and a packed zero.
        grouped = isinstance(group, int) and group > 0
        return f"{bits} bits packed", bits, (2 + bits / 8) / group if grouped else 0  # type: ignore[operator]
    notes.append(
        f"The quantization {method or 'of the model'!r} is not known, so the weights are counted without it."
    )
    return "", 0, 0


def _packed_weights(model: Any) -> set[int]:
    """The ids of the linear weights that quantization packs."""
    from torch import nn

    skipped = _quantization(model)
    names = skipped.get("llm_int8_skip_modules") or skipped.get("modules_to_not_convert") or ()
    kept = {id(parameter) for module in saved_modules(model).values() for parameter in module.parameters()}
    kept |= {id(parameter) for output in output_embeddings(model) for parameter in output.parameters()}
    return {
        id(module.weight)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name in path for name in names)
    } - kept


# --- the training state ------------------------------------------------------------------------------------------

# The numbers in an optimizer's state per trained parameter, by the beginning of its name in Transformers.
_STATES = {
    "adamw_torch": 2,
    "adamw_bnb": 2,
    "adamw_8bit": 2,
    "paged_adamw": 2,
    "stable_adamw": 2,
    "grokadamw": 3,
    "ademamix": 3,
    "paged_ademamix": 3,
    "lion": 1,
    "paged_lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
    "lomo": 0,
    "schedule_free_sgd": 1,
    "schedule_free": 2,
}
_BLOCK = 256  # packed numbers that share a float32 scale
_SMALLEST_PACKED = 4096  # the state of smaller tensors stays in float32, in bitsandbytes and in torchao


def optimizer_bytes(optim: str, shapes: Iterable[tuple[int, ...]]) -> int | None:
    """The bytes of an optimizer's state for float32 parameters, or None if the optimizer is unknown.

    Args:
        optim: the optimizer's name in Transformers, as in a recipe's ``training.optim``.
        shapes: the shapes of the trained parameters.

    Example:
        >>> optimizer_bytes("adamw_torch", [(64, 128)]), optimizer_bytes("sgd", [(64, 128)])
        (65536, 0)
        >>> optimizer_bytes("adafactor", [(64, 128)])  # one number for each row and each column
        768
        >>> optimizer_bytes("paged_adamw_8bit", [(64, 128), (10,)])  # small tensors keep float32 state
        16720
    """
    if optim == "adafactor":
        return sum(4 * _factored(shape) for shape in shapes)
    states = next((states for name, states in _STATES.items() if optim.startswith(name)), None)
    if states is None:
        return None
    bits = 8 if optim.endswith("8bit") else 4 if optim.endswith("4bit") else 32
    total = 0.0
    for shape in shapes:
        count = math.prod(shape)
        packed = bits < 32 and count >= _SMALLEST_PACKED
        total += states * count * (bits / 8 + 4 / _BLOCK if packed else 4)
    return math.ceil(total)


def _optimizer_bytes(optim: str, shapes: Sequence[tuple[int, ...]], notes: list[str]) -> int:
    known = optimizer_bytes(optim, shapes)
    if known is not None:
        return known
    notes.append(f"The optimizer {optim!r} is not known here: its state is counted as AdamW's.")
    return optimizer_bytes("adamw_torch", shapes) or 0


def _factored(shape: tuple[int, ...]) -> int:
    """The numbers in Adafactor's state: one for each row and column of a matrix, one for each element otherwise."""
    count = math.prod(shape)
    return count // shape[-1] + count // shape[-2] if len(shape) >= 2 and count else count


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
