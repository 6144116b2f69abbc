"""The default form's choice: in each layer's principal basis, the directions that are worth least are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.method.scale import pace
from rankwise.method.worth import worth
from rankwise.parallel.holder import Step
from rankwise.parallel.sharded import local
from rankwise.run.basis import PrincipalBases, mean_strengths
from rankwise.run.choice.choice import Candidates
from rankwise.run.factors import Factors
from rankwise.run.gradient_checks import GradientChecks
from rankwise.run.pairs import KEYS


class PrincipalChoice:
    """Sums the norm of every block's gradient over the steps. At a cut, these sums weigh the directions.

    The gradient is that of the factor that starts at 0 and carries the update: B, or A in embeddings. Its norm is the
    root mean square over the block's ranks that are on. The sums are the run's ``sensitivity``, (blocks,). Steps with
    NaN or infinite gradients are left out.

    All layers have one pace. Their scale is the scale at the end of the run, times ``target_r / k`` while the average
    rank is k. Adam therefore moves the average layer equally far throughout the run.

    Args:
        factors: the factors of the run.
        target_r: the average rank at the end.
        use_rslora: whether scales are divided by the square root of the rank.
        end_scales: the scale of every layer at the end.
        warn: a function that gives each warning once.
    """

    counts_parameters: ClassVar[bool] = True

    def __init__(
        self,
        factors: Factors,
        target_r: float,
        use_rslora: bool,
        end_scales: Sequence[float],
        warn: Callable[[str], None],
    ) -> None:
        self._factors, self._target_r, self._use_rslora = factors, target_r, use_rslora
        self.end_scales, self._warn = list(end_scales), warn
        self.checks = GradientChecks(factors, "B", warn)
        self.entries = len(factors.layout.block_ranks)
        self._bases: PrincipalBases | None = None
        self._moved = False  # an optimizer has moved ranks that were off
        self._before_start: list[
            tuple[str, int, Tensor, int]
        ] = []  # the original values of factors that `start` changed

    @torch.no_grad()
    def start(self) -> None:
        """Give all layers their initial scale, and divide factors by the change, so that outputs stay the same."""
        scales, pairs = self._scales(final=False), self._factors.pairs
        for key in KEYS:
            carrying = [n for n, pair in enumerate(pairs) if pair.starts_at_zero == key]
            rows = self._factors.rows(key) if carrying else []
            louder = {n: scales[n] / pairs[n].scale for n in carrying}
            changed = {n: rows[n] / by for n, by in louder.items() if by != 1 and bool(rows[n].any())}
            if changed:
                before = [(n, rows[n].clone()) for n in changed]
                self._factors.write_rows(key, changed)
                self._before_start += [(key, n, old, self._version(key, n)) for n, old in before]
        for pair, scale in zip(pairs, scales, strict=True):
            pair.scale = scale

    def _version(self, key: str, layer: int) -> int:
        return local(self._factors.pairs[layer].parameter(key))._version

    def _undo_start(self) -> None:
        """Restore the factors that `start` changed, unless they have been changed since."""
        for key, n, old, version in self._before_start:
            if self._version(key, n) == version:
                self._factors.write_rows(key, {n: old})
        self._before_start.clear()

    def _scales(self, final: bool) -> list[float]:
        by = 1.0 if final else pace(self._target_r, self._factors.average_rank(), self._use_rslora)
        return [scale * by for scale in self.end_scales]

    def keep_off(self, moves_zeros: bool) -> None:
        if moves_zeros or self._moved:
            self._factors.switch_off()

    @torch.no_grad()
    def restore(self, scales: Sequence[float]) -> None:
        self._undo_start()
        scales = scales or self._scales(final=False)
        for pair, scale in zip(self._factors.pairs, scales, strict=True):
            pair.scale = scale

    def observe(self, step: Step, number: int) -> None:
        self._before_start.clear()
        measured = self._factors.measured
        if not self.checks.has_gradients(step, [each.number for each in measured]):
            return
        squares = step.squared_norms(measured, self._factors.mask.device)
        finite = squares.isfinite().all()
        norms = (squares / self._factors.block_ranks().clamp_min(1)).sqrt()
        self._factors.tensors.get("sensitivity").add_(torch.where(finite, norms, 0.0))
        self.checks.count(finite, number)

    def candidates(self) -> Candidates:
        bases = self._bases = PrincipalBases(self._factors)
        if not self._moved and bases.off_ones_moved():
            self._moved = True
            self._warn(
                "The optimizer has moved ranks that are off and have no gradient. Optimizers that add noise do so, and "
                "so do optimizers whose moments rankwise can't find. From now on these ranks are switched off again "
                "after each step."
            )
        acts, unchanged = bases.acts(), bases.undecomposed()
        if unchanged:
            path = self._factors.pairs[unchanged[0]].path
            self._warn(
                f"The adapter of {path!r} holds NaN or infinite values, or numbers too large to compute with. "
                f"For this reason {len(unchanged)} of {len(self._factors.pairs)} layers keep the ranks that they have. "
                "The run diverges: go back to an earlier checkpoint, and lower the learning rate."
            )
        scores = self._worth(bases.strengths()).nan_to_num(nan=0.0)
        return Candidates(scores, acts, unchanged)

    def _worth(self, strengths: Tensor) -> Tensor:
        """The worth of directions per cost, (ranks,), from their strengths in B A."""
        factors, device = self._factors, strengths.device
        sums = factors.tensors.get("sensitivity")
        norms = factors.spread(torch.where(sums.any(), sums, 1.0))
        repeats = torch.tensor(factors.layout.ranks, device=device)
        scales = torch.tensor([pair.scale for pair in factors.pairs], dtype=torch.float32, device=device)
        loud = strengths * scales.repeat_interleave(repeats)
        return worth(loud, norms, factors.layout.parameters_per_rank(device), self._target_r)

    def apply(
        self, mask: Tensor, unchanged: Sequence[bool], final: bool, optimizers: Sequence[Optimizer]
    ) -> None:
        bases, self._bases = self._bases or PrincipalBases(self._factors), None
        scales, pairs = self._scales(final), self._factors.pairs
        louder = {n: scales[n] / pair.scale for n, pair in enumerate(pairs) if not unchanged[n]}
        bases.write(mask, louder, optimizers)
        for n in louder:
            pairs[n].scale = scales[n]

    def rank_importance(self) -> Tensor:
        return self._worth(mean_strengths(self._factors))
