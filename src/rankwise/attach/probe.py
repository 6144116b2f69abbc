"""Which layers will use rank: the gradients of a model's weights over a few batches, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.kinds import adapters_for
from rankwise.adapters.linear import LinearAdapters
from rankwise.attach.rank_plan import RankPlan
from rankwise.attach.targets import find_targets
from rankwise.config import LoraConfig
from rankwise.config.checks import check_number, check_whole
from rankwise.method.spectrum import GradientSketch, effective_rank
from rankwise.method.truncation import kept_by, ranks_for_budget, ranks_for_share

_FLOAT16_SCALE = 1024.0  # small gradients vanish in float16
_LEAST, _MOST = 1e-140, 1e140  # norms, which only double precision has: their squares are numbers of it, too


@dataclass(frozen=True)
class LayerSpectrum:
    """What a layer's averaged gradient is like.

    Args:
        path: the layer's, in the model.
        d_out: rows of its weight.
        d_in: columns of its weight.
        singular_values: the largest of the gradient, falling.
        square: the gradient's squared norm: the sum of all squared singular values.
        exact: whether these are exact; otherwise the gradient was sketched, and they are a little too small.
    """

    path: str
    d_out: int
    d_in: int
    singular_values: Sequence[float]
    square: float
    exact: bool

    @property
    def width(self) -> int:
        """Parameters that one rank takes."""
        return self.d_out + self.d_in

    @property
    def effective_rank(self) -> float:
        """How many directions the gradient has, of those that were looked at; see `effective_rank`."""
        return effective_rank(self.singular_values)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        shown = {name: getattr(self, name) for name in ("path", "d_out", "d_in", "square", "exact")}
        return {**shown, "effective_rank": self.effective_rank, "singular_values": list(self.singular_values)}


@dataclass(frozen=True)
class Probe:
    """The gradients of a model's layers; as a string, a table.

    Args:
        layers: one entry a layer, in the model's order.
        batches: how many were averaged.
        left_out: layers that were asked for and are of a kind that can't be probed.
    """

    layers: Sequence[LayerSpectrum]
    batches: int
    left_out: Sequence[str] = ()

    def plan(
        self,
        *,
        parameters: int | None = None,
        bytes: int | None = None,
        keep: float | None = None,
        rank: float | None = None,
        bytes_per_parameter: int = 4,
    ) -> RankPlan:
        """Ranks for a budget: those that hold the most of the gradient, by its square per parameter.

        Args:
            parameters: of the adapter, at most.
            bytes: of the adapter's file, at most.
            keep: the share of the gradient's squared norm to hold, in (0, 1].
            rank: as many parameters as LoRA with this rank in all layers has.
            bytes_per_parameter: in the file: 4, or 2 for a half-precision one.

        Raises:
            TypeError, ValueError: not just one budget, or one that gives no layer a rank or that can't be reached.

        Example:
            >>> q, v = (LayerSpectrum(name, 8, 8, [2.0, 1.0], 5.0, True) for name in "qv")
            >>> Probe([q, v], batches=1).plan(parameters=32).ranks
            {'q': 1, 'v': 1}
        """
        if sum(goal is not None for goal in (parameters, bytes, keep, rank)) != 1:
            raise ValueError("Give one of `parameters`, `bytes`, `keep` and `rank`.")
        widths = {layer.path: layer.width for layer in self.layers}
        # Only shares count, and squares of numbers near 1 neither overflow nor vanish.
        unit = max(value for layer in self.layers for value in layer.singular_values) or 1.0
        squares = {
            layer.path: [(value / unit) ** 2 for value in layer.singular_values] for layer in self.layers
        }
        whole = sum(layer.square / unit / unit for layer in self.layers)
        if keep is not None:
            ranks = ranks_for_share(squares, widths, self._share_of_found(keep, squares, whole))
        else:
            ranks = ranks_for_budget(
                squares, widths, self._budget(parameters, bytes, rank, bytes_per_parameter)
            )
        return RankPlan(ranks, widths, min(1.0, kept_by(squares, ranks) / whole))

    def _budget(
        self, parameters: int | None, bytes: int | None, rank: float | None, bytes_per_parameter: int
    ) -> int:
        widths = [layer.width for layer in self.layers]
        if rank is not None:
            rank = check_number("rank", rank)
            if rank <= 0:
                raise ValueError(f"`rank` must be greater than 0, but is {rank:g}.")
            budget = math.floor(rank * sum(widths))
        elif bytes is not None:
            budget = check_whole("bytes", bytes, least=1) // bytes_per_parameter
        else:
            budget = check_whole("parameters", parameters, least=1)
        if budget < min(widths):
            raise ValueError(
                f"{budget:,} parameters are too few: one rank takes from {min(widths):,} to {max(widths):,}."
            )
        return budget

    def _share_of_found(self, keep: float, squares: Mapping[str, Sequence[float]], whole: float) -> float:
        keep = check_number("keep", keep)
        if not 0 < keep <= 1:
            raise ValueError(f"`keep` must be greater than 0 and at most 1, but is {keep:g}: 0.9 holds 90 %.")
        found = sum(map(sum, squares.values()))
        share = keep * whole / found
        if share > 1 + 1e-6:
            most = max(len(values) for values in squares.values())
            raise ValueError(
                f"`keep` is {keep:g}, but the first {most} directions of the layers hold only "
                f"{100 * found / whole:.0f} % of the gradient. Probe with a greater `max_rank`, or keep less."
            )
        return min(share, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "batches": self.batches,
            "layers": [layer.to_dict() for layer in self.layers],
            "left_out": list(self.left_out),
        }

    def table(self, plan: RankPlan | None = None) -> str:
        """A line a layer: its gradient's norm, its effective rank, and the rank of ``plan``."""
        widest = max(len(layer.path) for layer in self.layers)
        head = f"{'layer':<{widest}}  {'|gradient|':>10}  effective rank"
        lines = [head + ("  rank" if plan else "")]
        for layer in self.layers:
            line = f"{layer.path:<{widest}}  {math.sqrt(layer.square):>10.3g}  {layer.effective_rank:>14.1f}"
            lines.append(line + (f"  {plan.ranks[layer.path]:>4}" if plan else ""))
        if plan is not None:
            shown = f"{100 * plan.kept:.0f} % of the gradient's squared norm"
            lines.append(f"{plan.parameters:,} parameters hold {shown}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    config: LoraConfig | None = None,
    *,
    max_rank: int = 32,
    loss: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
) -> Probe:
    """Average the gradients of the layers that an adapter would adapt, without training anything.

    The model may be quantized or in half precision. Each layer's gradient is summed up as the backward pass reaches it,
    in a sketch that takes no more room than the layer's adapter of rank ``max_rank`` takes in training (its factors,
    their gradients and Adam's two averages); no gradient of a whole weight is kept. The model is as before afterwards.

    Args:
        model: the base model, without adapters, in the mode (``train()`` or ``eval()``) that it is to be probed in.
        batches: a few; they are gone through twice.
        config: says which layers, by ``target_modules`` and so on; None for the architecture's defaults.
        max_rank: how many directions of each layer to find, at least 1.
        loss: from the model and a batch to the loss; None for the ``loss`` of ``model(**batch)``.
        seed: of the sketch, and of dropout if the model trains.

    Raises:
        ValueError: no layer matches, there are no batches, or the gradients are not finite or all 0.
        TypeError: the model gives no loss.

    Example:
        >>> import rankwise as rw
        >>> torch.manual_seed(0) and None
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(4, 8), torch.tensor([0, 1, 0, 1])) for _ in range(3)]
        >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> found = rw.probe(model, batches, rw.LoraConfig(target_modules=["0", "2"]), loss=loss)
        >>> found.plan(rank=1).parameters <= 1 * (16 + 10)
        True
    """
    if getattr(model, "peft_config", None):
        raise ValueError(
            "`probe` looks at a base model, but this one has adapters. Call it before `get_peft_model`."
        )
    check_whole("max_rank", max_rank, least=1)
    own = list(batches)
    if not own:
        raise ValueError("`batches` is empty: give a few, such as 8.")
    targets = find_targets(model, config or LoraConfig())
    shapes = {path: shape for path, layer in targets.items() if (shape := _shape(layer)) is not None}
    if not shapes:
        raise ValueError("None of the target layers is linear: only linear layers can be probed.")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    sketches = {
        path: GradientSketch(d_out, d_in, max_rank, generator, wide) for path, (d_out, d_in) in shapes.items()
    }
    with _tapped({targets[path]: sketch for path, sketch in sketches.items()}, model) as scale:
        for number in range(max(sketch.passes for sketch in sketches.values())):
            _run(model, own, loss or _own_loss, seed, scale)
            _check_finite(sketches)
            if number == 0:
                _check_reached(sketches)
            for sketch in sketches.values():
                sketch.end_pass()
    by = len(own) * scale
    layers = [
        LayerSpectrum(
            path,
            *shapes[path],
            (sketch.singular_values() / by).tolist(),
            (sketch.norm() / by) ** 2,
            sketch.exact,
        )
        for path, sketch in sketches.items()
    ]
    return Probe(layers, len(own), [path for path in targets if path not in shapes])


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    """The d_out and d_in of a linear layer, quantized or not; None for others."""
    kind = adapters_for(layer)
    if kind is None or not issubclass(kind, LinearAdapters):
        return None
    (_, d_in), (d_out, _) = kind.factor_shapes(layer, 1, True)
    return d_out, d_in


def _own_loss(model: Any, batch: Any) -> Tensor:
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if loss is None:
        raise TypeError("The model gives no loss. Put labels into the batches, or give `loss=`, a function.")
    return loss  # type: ignore[no-any-return]


def _run(
    model: nn.Module, batches: Sequence[Any], loss: Callable[[Any, Any], Tensor], seed: int, scale: float
) -> None:
    """All batches forward and backward, with the same dropout each time."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        for batch in batches:
            (loss(model, _on(device, batch)) * scale).backward()


def _on(device: torch.device, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: _on(device, value) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_on(device, value) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _check_finite(sketches: Mapping[str, GradientSketch]) -> None:
    for path, sketch in sketches.items():
        size = sketch.size()
        if not math.isfinite(size):
            raise ValueError(
                f"The gradient of {path!r} is not finite. Look at the batches, or load the model in bfloat16 or "
                "float32."
            )
        if size and not _LEAST < size < _MOST:
            raise ValueError(
                f"The gradient of {path!r} has the norm {size:.3g}, of which no square can be formed: it must be from "
                f"{_LEAST:g} to {_MOST:g}. Multiply the loss by a number that brings it there."
            )


def _check_reached(sketches: Mapping[str, GradientSketch]) -> None:
    if not any(sketch.size() for sketch in sketches.values()):
        raise ValueError(
            "No gradient reaches any of the layers. Is the loss made of the model's output, with gradients on? "
            "Reentrant gradient checkpointing stops them: use_reentrant=False."
        )


# --- listening ---------------------------------------------------------------------------------------------------


@contextmanager
def _tapped(sketches: Mapping[nn.Module, GradientSketch], model: nn.Module) -> Iterator[float]:
    """Let each layer's sketch hear its input and its output's gradient, with no parameter asking for its own.

    Yields:
        What to multiply the loss with.
    """
    first = next(model.parameters())
    anchor = torch.zeros((), device=first.device, dtype=torch.float32, requires_grad=True)

    def listen(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if sketches[layer].finished or not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return output
        return _Tap.apply(x, output, anchor, sketches[layer])  # type: ignore[no-untyped-call]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [layer.register_forward_hook(listen, with_kwargs=True) for layer in sketches]
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield _FLOAT16_SCALE if half else 1.0
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


class _Tap(torch.autograd.Function):
    """A layer's output as it is; in the backward pass its sketch gets the input and the output's gradient.

    A function and not a hook on the output, because what it saves is then the business of gradient checkpointing, and
    is freed as the backward pass goes on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, anchor: Tensor, sketch: GradientSketch) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sketch = sketch
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.sketch.add(x.detach(), dy.detach())
        return None, dy, None, None
