"""Looking at the gradients of each step: whether the adapter trains at all, and whether they are finite."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.parallel.zero import ZeroParts
from rankwise.run.triplets import Triplets


class Watch(ABC):
    """Looks at the gradients of each step, and keeps what is to be remembered of them.

    Args:
        triplets: the adapter's.
        tell: says something to the user, once.
    """

    decisive: str  # the factor without which, if it does not train, a layer keeps the ranks that it has
    entries: int  # of each running average

    def __init__(self, triplets: Triplets, tell: Callable[[str], None]) -> None:
        self._triplets, self._tell = triplets, tell
        self._idle = set(range(len(triplets.layers)))  # layers that have had no gradient in any step
        self._told_of_skipped = False

    def frozen(self) -> list[bool]:
        """Which layers don't train, and so keep the triplets that they have."""
        return [not parameter.requires_grad for parameter in self._triplets.factors(self.decisive)]

    @abstractmethod
    def update(self, step: int) -> None:
        """Take in the gradients of step ``step``, which are still there."""

    @abstractmethod
    def update_from_parts(
        self, parts: ZeroParts, held: frozenset[int], optimizer: Optimizer, step: int
    ) -> None:
        """As `update`, where DeepSpeed ZeRO steps parts of the adapter: those numbered ``held``, now."""

    def all_had_gradients(self) -> None:
        """Forget which layers have had none: DeepSpeed ZeRO has zeros there."""
        self._idle.clear()

    def tell_of_idle_layers(self) -> None:
        """Name the layers that a whole warm-up has left without a gradient, while others had one."""
        trains = [not frozen for frozen in self.frozen()]
        paths: dict[str, Any] = self._triplets.layers
        idle = [path for n, path in enumerate(paths) if n in self._idle and trains[n]]
        if idle and len(self._idle) < len(paths):
            self._tell(
                f"The adapter on {', '.join(map(repr, idle[:3]))}{' and more' if len(idle) > 3 else ''} has had no "
                "gradient in any step so far, so it does not train: the loss goes round the layer, as TRL's goes round "
                "`lm_head`. Leave it out of `target_modules`, or train it whole (`modules_to_save`)."
            )

    def _gradients(self, factors: Sequence[nn.Parameter]) -> list[Any]:
        """The gradients of some factors, of all layers in their order; None where there is none."""
        gradients = [factor.grad for factor in factors]
        if all(gradient is None for gradient in gradients):
            self._tell(
                "An optimizer stepped, but no adapter parameter has a gradient, so it does not train. If this "
                "goes on, the adapter does not take part in the loss."
            )
        elif self._idle:
            count = len(self._triplets.layers)
            self._idle -= {n % count for n, gradient in enumerate(gradients) if gradient is not None}
        return gradients

    def _count(self, finite: Tensor, step: int) -> None:
        """Count a step whose gradients are not ``finite``, a 0-dim bool tensor, and say so after the first."""
        skipped = self._triplets.buffer("skipped").add_(~finite)
        if self._told_of_skipped or (skipped.device.type != "cpu" and step % 100):
            return  # elsewhere reading it would wait for the device
        if int(skipped):
            self._told_of_skipped = True
            warnings.warn(
                f"Step {step}: the adapter's gradients hold NaN or infinite values, so the step is left out of "
                "the importance scores, if there are any. Further ones are counted, too, in "
                "`model.allocation_state.skipped_steps`. Lower the learning rate or clip gradients if they go on.",
                stacklevel=2,
            )
