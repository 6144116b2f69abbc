"""How much memory training takes, from shapes alone: no weights, no data, nothing computed."""

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
    """Bytes that training holds at its highest point in each process, which is on each GPU.

    Args:
        weights: of the frozen base model and its buffers, by dtype or packing.
        adapters: A, B and E, and biases that train, as they are at the start.
        modules_to_save: the copies of modules that train whole.
        gradients: of all that trains.
        optimizer: the optimizer's state.
        run_state: AdaLoRA's running importance of ranks, or of every number of A, B and E, and its masks.
        buckets: copies of the gradients in which DistributedDataParallel sends them; 0 for one process.
        activations: what forward and backward hold at their highest point beyond the lines above; None if it could
            not be found out.
        evaluation: what the forward pass of an evaluation holds instead of gradients and activations; likewise.
        processes: how many processes train. Each has all of this.
        batch: the names and shapes of the batch that ``activations`` is for.
        evaluation_batch: the same for ``evaluation``.
        notes: what could not be counted, a sentence each.
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
        """The greater of both."""
        return max(self.training, self.evaluating)

    def parts(self) -> Iterator[tuple[str, int]]:
        """What holds any memory in training, by a name for people, and its bytes."""
        yield from ((f"base weights, {dtype}", size) for dtype, size in self.weights.items())
        named = (
            ("adapters", self.adapters),
            ("modules trained whole", self.modules_to_save),
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
    """A number of bytes for people.

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
    """Estimate what training an adapted model takes.

    Args:
        model: adapted, on the meta device, in the dtypes that training has; it is used up.
        batch: the largest training batch of a process, labels included; None if it is not known.
        training: optimizer, precision, checkpointing and accumulation.
        processes: how many processes train.
        evaluation_batch: the largest batch in evaluation; None if it is not known.
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
        # Between backward and the next forward, penalty and scores make a few copies of the factors.
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
    """Peaks in training (gradients included) and in evaluation; None for what can't be found out."""
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
        notes.append(f"The activations of {type(model).__name__} are not in it: {reason}")
    return peak, evaluation


# --- the frozen model --------------------------------------------------------------------------------------------


def frozen_bytes(model: Any, notes: list[str] | None = None) -> tuple[dict[str, int], int]:
    """Bytes of what does not train, by dtype, as it is once loaded.

    A configuration with ``quantization_config`` tells how linear layers are packed, though on the meta device they
    are not; those that train whole and the output layer stay as they are.

    Args:
        model: adapted.
        notes: gets a sentence if the packing is not known.

    Returns:
        Bytes by the name of the dtype or packing, and the bytes of the largest packed weight once unpacked, as
        happens to one layer after the other.
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
    """A, B and E of all layers; E need not train."""
    for layer in adapter_layers(model).values():
        for adapter in layer.lora_A:
            yield from layer.adapter_parameters(adapter).values()


def _distinct(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, tied ones once, without those that hold AdaLoRA's state."""
    yield from model.parameters()
    yield from (buffer for name, buffer in model.named_buffers() if not name.startswith("rankwise_"))


def _quantization(model: Any) -> dict[str, Any]:
    config = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    return dict(config if isinstance(config, Mapping) else config.to_dict())


def _packing(config: Mapping[str, Any], notes: list[str]) -> tuple[str, float, float]:
    """A packing's name, its bits for each weight, and the bytes for each weight that its scales add."""
    if not config:
        return "", 0, 0
    method = str(config.get("quant_method", "")).rpartition(".")[2].lower()
    if config.get("load_in_4bit"):
        # A scale for 64 weights: float32, or 8 bits with a float32 for 256 of them.
        scale = 1 + 4 / 256 if config.get("bnb_4bit_use_double_quant") else 4
        return "4 bits packed", 4, scale / 64
    if config.get("load_in_8bit"):
        return "8 bits packed", 8, 0
    bits, group = config.get("bits"), config.get("group_size")
    if isinstance(bits, int) and method in ("gptq", "awq"):
        # A float16 scale and a packed zero for a group of weights in a column.
        grouped = isinstance(group, int) and group > 0
        return f"{bits} bits packed", bits, (2 + bits / 8) / group if grouped else 0  # type: ignore[operator]
    notes.append(f"The quantization {method or 'of the model'!r} is not known here: counted without it.")
    return "", 0, 0


def _packed_weights(model: Any) -> set[int]:
    """Ids of the linear weights that quantization packs."""
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


# --- what trains -------------------------------------------------------------------------------------------------

# Numbers of state for each trained number, by the beginning of the optimizer's name in Transformers.
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
_SMALLEST_PACKED = 4096  # smaller tensors' state stays in float32, in bitsandbytes as in torchao


def optimizer_bytes(optim: str, shapes: Iterable[tuple[int, ...]]) -> int | None:
    """Bytes of an optimizer's state for float32 parameters, or None if the optimizer is not known.

    Args:
        optim: its name in Transformers, as in a recipe's ``training.optim``.
        shapes: of the parameters that train.

    Example:
        >>> optimizer_bytes("adamw_torch", [(64, 128)]), optimizer_bytes("sgd", [(64, 128)])
        (65536, 0)
        >>> optimizer_bytes("adafactor", [(64, 128)])  # a number for each row and column
        768
        >>> optimizer_bytes("paged_adamw_8bit", [(64, 128), (10,)])  # a byte, and scales; small ones in float32
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
    """Numbers of state in Adafactor: those of rows and columns for matrices, one each for the rest."""
    count = math.prod(shape)
    return count // shape[-1] + count // shape[-2] if len(shape) >= 2 and count else count


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
