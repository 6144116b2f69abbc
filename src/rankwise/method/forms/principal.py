"""LoRA's start and pace, and cuts in principal directions: the default."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from rankwise.method.forms.form import AsLora, Form

_CUTS = 20
_ENOUGH = 8


class PrincipalForm(Form):
    """B = 0 and A random, as in LoRA; before each cut every layer is rotated into its principal directions.

    Then the directions of all layers that are worth least for their parameters are cut. Their worth depends on their
    singular value and on the gradients that their layer has had (see `rankwise.method.principal` and
    `rankwise.method.worth`).

    There is no E. All layers have one scale. It is ``lora_alpha / k`` while k ranks act on average, and from the last
    cut on ``lora_alpha / target_r``. Adam moves a layer in proportion to scale times rank, so the average layer moves
    as in LoRA throughout the run.

    Example:
        >>> PrincipalForm().lora_alpha(target_r=8, use_rslora=False)
        16
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

    def lora_alpha(self, target_r: float, use_rslora: bool) -> float:
        """Twice the rank, as is usual for LoRA, so that the scale ends at 2."""
        return 2 * target_r

    def deltaT(self, steps: int) -> int:
        """Twenty cuts, however long the run is."""
        return max(1, steps // _CUTS)

    def start(self, A: Tensor, E: Tensor | None, B: Tensor, as_lora: AsLora) -> None:
        as_lora(A, B)
