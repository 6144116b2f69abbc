"""Estimates which layers need rank from the gradients of the weights over a few batches, without training."""

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

_FLOAT16_SCALE = 1024.0  # factor of the loss, because small gradients vanish in float16
_LEAST, _MOST = 1e-140, 1e140  # squares of norms between these bounds fit into double precision


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of one layer's averaged gradient.

    Args:
        path: path of the layer in the model.
        d_out: number of rows of its weight.
        d_in: number of columns of its weight.
        singular_values: largest singular values of the gradient, in descending order, at least 0.
        square: squared Frobenius norm of the gradient, which is the sum of all squared singular values.
        exact: whether the values are exact. False: they come from a sketch, and are slightly too small.

    Example:
        >>> layer = LayerSpectrum("q_proj", d_out=8, d_in=4, singular_values=[2.0, 1.0], square=5.0, exact=True)
        >>> layer.width, round(layer.effective_rank, 2)
        (12, 1.89)
    """

    path: str
    d_out: int
    d_in: int
    singular_values: Sequence[float]
    square: float
    exact: bool

    @property
    def width(self) -> int:
        """Number of parameters of one rank."""
        return self.d_out + self.d_in

    @property
    def effective_rank(self) -> float:
        """Number of directions in which the gradient acts, among those in ``singular_values``, at least 0."""
        return effective_rank(self.singular_values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the effective rank as plain data."""
        shown = {name: getattr(self, name) for name in ("path", "d_out", "d_in", "square", "exact")}
        return {**shown, "effective_rank": self.effective_rank, "singular_values": list(self.singular_values)}


@dataclass(frozen=True)
class Probe:
    """The gradients of a model's layers. ``str`` shows them as a table.

    Args:
        layers: one entry for each layer, in the model's order.
        batches: number of batches in the average, at least 1.
        left_out: paths of target layers of a kind that cannot be probed.

    Example:
        >>> layer = LayerSpectrum("q_proj", d_out=8, d_in=4, singular_values=[2.0, 1.0], square=5.0, exact=True)
        >>> print(Probe([layer], batches=8))
        layer   |gradient|  effective rank
        q_proj        2.24             1.9
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
        """Plan ranks for a budget. Give exactly one of ``parameters``, ``bytes``, ``keep`` and ``rank``.

        Directions are taken by their square per parameter, so that the ranks hold as much of the gradient as possible.

        Args:
            parameters: largest number of parameters of the adapter, at least that of one rank.
            bytes: largest size of the adapter's file, in bytes.
            keep: share of the gradient's squared norm to hold, in (0, 1].
            rank: average rank, greater than 0. The budget is the parameters of LoRA of this rank on all layers.
            bytes_per_parameter: bytes of one parameter in the file: 4, or 2 in half precision.

        Returns:
            A rank for each layer, which may be 0.

        Raises:
            TypeError: a budget is not a number.
            ValueError: not exactly one budget is given, the budget is too small for any rank, or ``keep`` cannot be
                reached.

        Example:
            >>> q, v = (LayerSpectrum(name, 8, 8, [2.0, 1.0], 5.0, True) for name in "qv")
            >>> Probe([q, v], batches=1).plan(parameters=32).ranks
            {'q': 1, 'v': 1}
        """
        if sum(goal is not None for goal in (parameters, bytes, keep, rank)) != 1:
            raise ValueError("Give one of `parameters`, `bytes`, `keep` and `rank`.")
        widths = {layer.path: layer.width for layer in self.layers}
        # Only ratios matter, and squares of numbers near 1 neither overflow nor vanish.
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
        """Return the probe as plain data."""
        return {
            "batches": self.batches,
            "layers": [layer.to_dict() for layer in self.layers],
            "left_out": list(self.left_out),
        }

    def table(self, plan: RankPlan | None = None) -> str:
        """Return a table of all layers: the norm of the gradient, its effective rank, and the rank in ``plan``.

        Args:
            plan: ranks to show, with a line on the share that they hold. None: the table has no ranks.
        """
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
    """Average the gradients of the layers that an adapter would adapt. Nothing trains.

    The model may be quantized or in half precision. Each layer's gradient is summed when the backward pass reaches the
    layer. The sum is a sketch, and the gradient of a whole weight is never stored. A sketch takes at most as much
    memory as training the layer's adapter of rank ``max_rank``: its factors, their gradients and Adam's two averages.
    The model is unchanged afterwards.

    Args:
        model: base model without adapters, in the mode (``train()`` or ``eval()``) in which to probe it.
        batches: a few batches, such as 8. They are used twice.
        config: configuration whose ``target_modules`` and related fields name the layers. None: the architecture's
            default layers.
        max_rank: number of directions to find in each layer, at least 1.
        loss: function that takes the model and a batch and returns the loss. None: the ``loss`` of ``model(**batch)``.
        seed: seed of the sketch, and of dropout if the model is in training mode.

    Returns:
        The singular values of each layer's gradient. `Probe.plan` makes ranks from them.

    Raises:
        TypeError: the model returns no loss, or ``max_rank`` is not a whole number.
        ValueError: the model has adapters, no layer matches, there are no batches, or gradients are not finite or all
            are 0.

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
    """d_out and d_in of a linear layer, quantized or not. None for other layers."""
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
    """Run all batches forward and backward, with the same dropout each time."""
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
                f"The gradient of {path!r} has the norm {size:.3g}, whose square does not fit into double precision: "
                f"the norm must be from {_LEAST:g} to {_MOST:g}. Multiply the loss by a number that brings it there."
            )


def _check_reached(sketches: Mapping[str, GradientSketch]) -> None:
    if not any(sketch.size() for sketch in sketches.values()):
        raise ValueError(
            "No gradient reaches any of the layers. Is the loss computed from the model's output, with gradients "
            "enabled? Re-entrant gradient checkpointing stops them: set use_reentrant=False."
        )


# --- hooks -------------------------------------------------------------------------------------------------------


@contextmanager
def _tapped(sketches: Mapping[nn.Module, GradientSketch], model: nn.Module) -> Iterator[float]:
    """Let each layer's sketch receive the layer's input and its output's gradient. All parameters are frozen meanwhile.

    Yields:
        The factor by which to multiply the loss.
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
    """Returns a layer's output unchanged. The backward pass gives its input and its output's gradient to the sketch.

    An autograd function is used instead of a hook on the output. Gradient checkpointing then manages what it saves, and
    frees it as the backward pass goes on.
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
