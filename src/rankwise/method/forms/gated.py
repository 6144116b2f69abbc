"""LoRA's start and pace, with a gate for each rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from rankwise.method.forms.form import Form
from rankwise.method.importance import GateImportance, Importance
from rankwise.method.layout import TripletLayout
from rankwise.method.scale import lora_scale

_MOST_ALPHA = 32


class GatedForm(Form):
    """B = 0 and A random, as in LoRA; E is a gate that does not train, open until its rank is pruned for good.

    Example:
        >>> GatedForm().gate(init_r=12, target_r=8, use_rslora=False)
        1.5
    """

    name: ClassVar[str] = "gated"
    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    counts_parameters: ClassVar[bool] = True
    grows_back: ClassVar[bool] = False
    takes_rslora: ClassVar[bool] = True
    orth_reg_weight: ClassVar[float] = 0.0

    def lora_alpha(self, target_r: float, use_rslora: bool) -> int:
        # A layer's ranks pull together, so that from 8 on more of them have to pull less. See docs/quality.md.
        return 8 if use_rslora else min(4 * int(target_r), _MOST_ALPHA)

    def gate(self, init_r: int, target_r: float, use_rslora: bool) -> float:
        """An open gate makes the scale LoRA's at rank ``target_r``, whatever there is to spare."""
        return lora_scale(init_r, target_r, use_rslora)

    def start(
        self, A: Tensor, E: Tensor, B: Tensor, as_lora: Callable[[Tensor, Tensor], None], gate: float
    ) -> None:
        as_lora(A, B)
        E.fill_(gate)

    def importance(self, layout: TripletLayout) -> Importance:
        return GateImportance(layout)
