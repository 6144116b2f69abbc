"""What a form of the method decides. Every other file asks the form, and none asks which form it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from rankwise.method.importance import Importance
from rankwise.method.layout import TripletLayout


class Form(ABC):
    """One form of adaptive-rank LoRA: how it starts, what it scores, what a rank costs, what trains, which scale.

    A form holds no state. A new one is a file in this folder, and a line in ``__init__.py``.
    """

    name: ClassVar[str]
    # The factors that train, and whether an optimizer may hold them.
    trained: ClassVar[tuple[str, ...]]
    # What a rank costs: its numbers in A and B, or one.
    counts_parameters: ClassVar[bool]
    # Whether a rank that was pruned may come back until the final phase.
    grows_back: ClassVar[bool]
    takes_rslora: ClassVar[bool]
    # What the fields of a configuration are where they are left out.
    orth_reg_weight: ClassVar[float]

    @abstractmethod
    def lora_alpha(self, target_r: float, use_rslora: bool) -> int:
        """``lora_alpha`` where it is left out."""

    @abstractmethod
    def gate(self, init_r: int, target_r: float, use_rslora: bool) -> float:
        """What E is multiplied by to give the update its scale, as ``lora_alpha / init_r`` is outside of it."""

    @abstractmethod
    def start(
        self, A: Tensor, E: Tensor, B: Tensor, as_lora: Callable[[Tensor, Tensor], None], gate: float
    ) -> None:
        """Fill A (r, d_in), E (r, 1) and B (d_out, r) in place.

        Args:
            A: any values.
            E: any values.
            B: any values.
            as_lora: fills A and B as plain LoRA would in such a layer.
            gate: what `gate` gave.
        """

    @abstractmethod
    def importance(self, layout: TripletLayout) -> Importance:
        """What is scored."""
