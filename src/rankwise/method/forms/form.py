"""The decisions that a form of the method makes. Other files ask the form for a decision, never for its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

AsLora = Callable[[Tensor, Tensor], None]


class Form(ABC):
    """One form of adaptive-rank LoRA: its factors, their start, and the defaults of its settings.

    A form holds no state. A new one is a file in this folder and a line in ``__init__.py``; a configuration must take
    its name, and checkpoints know it by a number in `rankwise.run.state`.
    """

    name: ClassVar[str]
    has_E: ClassVar[bool]  # B diag(E) A, where everything trains; else B A, as in LoRA
    counts_parameters: ClassVar[bool]  # a rank costs its numbers in A and B; or else one
    takes_rslora: ClassVar[bool]
    # What the fields of a configuration are where they are left out; phases are fractions of the run.
    orth_reg_weight: ClassVar[float]
    tinit: ClassVar[float]
    tfinal: ClassVar[float]

    @abstractmethod
    def init_r(self, target_r: float) -> int:
        """``init_r`` where it is left out."""

    @abstractmethod
    def lora_alpha(self, target_r: float, use_rslora: bool, cuts: bool = True) -> float:
        """``lora_alpha`` where it is left out. ``cuts``: whether the run cuts any rank."""

    @abstractmethod
    def deltaT(self, steps: int) -> int:
        """Steps between two cuts where it is left out, with ``steps`` of pruning."""

    @abstractmethod
    def start(self, A: Tensor, E: Tensor | None, B: Tensor, as_lora: AsLora) -> None:
        """Fill A (r, d_in), E (r, 1) and B (d_out, r) in place.

        Args:
            A: any values.
            E: any values; None where the form has no E.
            B: any values.
            as_lora: fills A and B as plain LoRA would in such a layer.
        """
