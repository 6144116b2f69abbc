"""LoRA's start and pace, and cuts in principal directions: the default."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from rankwise.method.forms.form import AsLora, Form

_CUTS = 20
_ENOUGH = 8
_AS_FAST_AS_LORA = 2  # the average rank up to which the rotation slows nothing


class PrincipalForm(Form):
    """B = 0 and A random, as in LoRA; before each cut every layer is rotated into its principal directions.

    Then the directions of all layers that are worth least for their parameters are cut. Their worth depends on their
    singular value and on the gradients that their layer has had (see `rankwise.method.principal` and
    `rankwise.method.worth`).

    There is no E. All layers have one scale. It is ``lora_alpha / k`` while k ranks act on average, and from the last
    cut on ``lora_alpha / target_r``. Adam moves a layer in proportion to scale times rank, so the average layer moves
    equally far throughout the run.

    Example:
        >>> PrincipalForm().lora_alpha(target_r=8, use_rslora=False)
        23
    """

    name: ClassVar[str] = "principal"
    has_E: ClassVar[bool] = False
    counts_parameters: ClassVar[bool] = True
    takes_rslora: ClassVar[bool] = True
    orth_reg_weight: ClassVar[float] = 0.0
    # Early: the sooner a layer is rotated and cut, the longer what stays trains as it will be (see
    # benchmarks/quality/choices.md).
    tinit: ClassVar[float] = 0.02
    tfinal: ClassVar[float] = 0.6

    def init_r(self, target_r: float) -> int:
        """Eight, or twice ``target_r`` from 4 up.

        Example:
            >>> [PrincipalForm().init_r(target_r) for target_r in (0.25, 1, 2, 8, 64)]
            [8, 8, 8, 16, 128]
        """
        return math.ceil(max(_ENOUGH, 2 * target_r))

    def lora_alpha(self, target_r: float, use_rslora: bool, cuts: bool = True) -> float:
        """``2 * target_r * (target_r / 2) ** (1 / 4)``, rounded, from rank 2 up; else twice ``target_r``, as for LoRA.

        In LoRA all r columns of B follow the strongest direction, so r steps of Adam move it together. In the principal
        basis one column follows it alone, and it moves up to ``sqrt(r)`` times less far. At rank 2 a run learns as fast
        as LoRA nevertheless, and ``(r / 2) ** (1 / 4)`` makes up for about half of what is lost above (measured in
        benchmarks/quality/choices.md). Runs without cuts rotate nothing, and rsLoRA's scale is already greater by
        ``sqrt(r)``, so they need no such factor.

        Example:
            >>> [PrincipalForm().lora_alpha(target_r, use_rslora=False) for target_r in (0.5, 1, 2, 8, 64)]
            [1.0, 2, 4, 23, 304]
        """
        if target_r <= _AS_FAST_AS_LORA or use_rslora or not cuts:
            return 2 * target_r
        return round(2 * target_r * math.pow(target_r / _AS_FAST_AS_LORA, 1 / 4))

    def deltaT(self, steps: int) -> int:
        """Twenty cuts, however long the run is."""
        return max(1, steps // _CUTS)

    def start(self, A: Tensor, E: Tensor | None, B: Tensor, as_lora: AsLora) -> None:
        as_lora(A, B)
