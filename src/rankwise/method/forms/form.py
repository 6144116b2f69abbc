"""What a form of the method decides. Every other file asks the form, and none asks which form it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from rankwise.method.importance import Importance
from rankwise.method.layout import TripletLayout

AsLora = Callable[[Tensor, Tensor], None]


class Form(ABC):
    """One form of adaptive-rank LoRA: how it starts, what it scores, what a rank costs, what trains, which scale.

    A form holds no state. A new one is a file in this folder and a line in ``__init__.py``; a configuration must take
    its name, and checkpoints know it by a number in `rankwise.run.state`.
    """

    name: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]  # of "lora_A", "lora_E" and "lora_B"
    counts_parameters: ClassVar[bool]  # a rank costs its numbers in A and B; or else one
    grows_back: ClassVar[bool]  # a pruned rank may come back until the final phase
    takes_rslora: ClassVar[bool]
    # What the fields of a configuration are where they are left out; phases are fractions of the run.
    orth_reg_weight: ClassVar[float]
    tinit: ClassVar[float]
    tfinal: ClassVar[float]

    @abstractmethod
    def init_r(self, target_r: float) -> int:
        """``init_r`` where it is left out."""

    @abstractmethod
    def lora_alpha(self, target_r: float, use_rslora: bool) -> float:
        """``lora_alpha`` where it is left out."""

    @abstractmethod
    def deltaT(self, steps: int) -> int:
        """Steps between two allocations where it is left out, with ``steps`` of pruning."""

    @abstractmethod
    def start(self, A: Tensor, E: Tensor, B: Tensor, as_lora: AsLora, use_rslora: bool) -> None:
        """Fill A (r, d_in), E (r, 1) and B (d_out, r) in place.

        Args:
            A: any values.
            E: any values.
            B: any values.
            as_lora: fills A and B as plain LoRA would in such a layer.
            use_rslora: the configuration's.
        """

    @abstractmethod
    def importance(self, layout: TripletLayout) -> Importance | None:
        """What is scored element by element; None: principal directions are found, and scored by `worth`."""

    def gates(self, init_r: int, average: Tensor, use_rslora: bool) -> Tensor | None:
        """E of the triplets that stay, a number, once layers have so many ranks on average; None: as it is."""
        return None
