"""The form of the paper, number for number as Hugging Face PEFT has it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from rankwise.method.forms.form import AsLora, Form

_DEVIATION = 0.02  # of the start of A and B


class PaperForm(Form):
    """E holds singular values that start at 0 and train (Zhang et al., 2023, https://arxiv.org/abs/2303.10512).

    Args:
        random: start with a random E and larger factors, so that the update is not 0; for tests.

    Example:
        >>> PaperForm().has_E
        True
    """

    name: ClassVar[str] = "paper"
    has_E: ClassVar[bool] = True
    counts_parameters: ClassVar[bool] = False
    takes_rslora: ClassVar[bool] = False
    orth_reg_weight: ClassVar[float] = 0.5
    tinit: ClassVar[float] = 0  # PEFT's, in steps
    tfinal: ClassVar[float] = 0

    def __init__(self, random: bool = False) -> None:
        self.random = random

    def init_r(self, target_r: float) -> int:
        return 12

    def lora_alpha(self, target_r: float, use_rslora: bool, cuts: bool = True) -> float:
        return 8

    def deltaT(self, steps: int) -> int:
        return 1

    def start(self, A: Tensor, E: Tensor | None, B: Tensor, as_lora: AsLora) -> None:
        if E is not None:
            nn.init.normal_(E) if self.random else nn.init.zeros_(E)
        for factor in (A, B):
            nn.init.normal_(factor, std=1.0 if self.random else _DEVIATION)
