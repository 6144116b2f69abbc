"""LoRA's start and pace, and cuts in principal directions: the default."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.method.forms.form import AsLora, Form
from rankwise.method.importance import Importance
from rankwise.method.layout import TripletLayout

_CUTS = 20
_ENOUGH = 8


class PrincipalForm(Form):
    """B = 0 and A random, as in LoRA; before each cut every layer is turned into its principal directions.

    Then the directions go, over all layers, that are worth least for their parameters, by their singular value and by
    the gradients that their layer has had (see `rankwise.method.principal` and `rankwise.method.worth`).

    E does not train. It holds the scale, one for all layers: that of LoRA at the average rank k of now,
    ``lora_alpha / k``. How far a step of Adam moves a layer goes with its scale times its ranks; so that is LoRA's on
    average, at any time, however many ranks there are to spare or left, and more where more of them stayed.

    Example:
        >>> PrincipalForm().lora_alpha(target_r=8, use_rslora=False)
        16
    """

    name: ClassVar[str] = "principal"
    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    counts_parameters: ClassVar[bool] = True
    grows_back: ClassVar[bool] = False
    takes_rslora: ClassVar[bool] = True
    orth_reg_weight: ClassVar[float] = 0.0
    # Early: the sooner a layer is turned and cut, the longer what stays trains as it will be (docs/quality-choices.md).
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
        """Twenty allocations, however long the run is."""
        return max(1, steps // _CUTS)

    def start(self, A: Tensor, E: Tensor, B: Tensor, as_lora: AsLora, use_rslora: bool) -> None:
        as_lora(A, B)
        E.fill_(math.sqrt(len(E)) if use_rslora else 1.0)

    def importance(self, layout: TripletLayout) -> Importance | None:
        """No element: what a direction is worth is seen when it may be cut."""
        return None

    def gates(self, init_r: int, average: Tensor, use_rslora: bool) -> Tensor:
        """They make the scale ``lora_alpha / k`` at an average rank of k, or ``lora_alpha / sqrt(k)`` with rsLoRA.

        Example:
            >>> import torch
            >>> [float(PrincipalForm().gates(8, torch.tensor(k), use_rslora=False)) for k in (8.0, 2.0, 0.25)]
            [1.0, 4.0, 32.0]
        """
        acting = torch.where(average > 0, average, 1.0)  # with none left, no gate is open
        return init_r / (acting.sqrt() if use_rslora else acting)
