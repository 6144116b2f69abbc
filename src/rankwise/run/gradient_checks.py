"""Checks whether the adapter trains at all, and whether its gradients are finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor

from rankwise.parallel.holder import Step
from rankwise.run.factors import Factors


class GradientChecks:
    """Records which factors have gradients, and counts steps whose gradients are not finite.

    Args:
        factors: the factors of the run.
        decisive: the kind of factor that decides: if it does not train in a layer, the layer keeps its ranks.
        warn: a function that gives each warning once.
    """

    def __init__(self, factors: Factors, decisive: str, warn: Callable[[str], None]) -> None:
        self._factors, self._decisive, self._warn = factors, decisive, warn
        self._idle = set(range(len(factors.pairs)))  # layers that have not had a gradient in any step
        self._warned_of_skipped = False

    def frozen(self) -> list[bool]:
        """For each layer, whether it does not train and therefore keeps its ranks. Warns if that is so for all."""
        frozen = [not trains for trains in self._factors.trains(self._decisive)]
        if all(frozen):
            self._warn(
                f"lora_{self._decisive} is frozen in all layers, so all layers keep their ranks, and none is cut. "
                f"Ranks adapt in layers whose lora_{self._decisive} trains."
            )
        return frozen

    def has_gradients(self, step: Step, numbers: Sequence[int]) -> bool:
        """Whether any of the factors ``numbers``, in layer order, has a gradient in ``step``. Warns if not."""
        has = step.has_gradients(numbers)
        if not any(has):
            if not all(self.frozen()):
                self._warn(
                    "An optimizer stepped, but no adapter parameter has a gradient, so it does not train. If this "
                    "goes on, the adapter does not take part in the loss."
                )
        elif self._idle:
            count = len(self._factors.pairs)
            self._idle -= {n % count for n, one_has in enumerate(has) if one_has}
        return any(has)

    def warn_of_idle_layers(self) -> None:
        """Warn of layers that had no gradient in the whole warm-up although others had one."""
        frozen, pairs = self.frozen(), self._factors.pairs
        idle = [pair.path for n, pair in enumerate(pairs) if n in self._idle and not frozen[n]]
        if idle and len(self._idle) < len(pairs):
            self._warn(
                f"The adapter on {', '.join(map(repr, idle[:3]))}{' and more' if len(idle) > 3 else ''} has had no "
                "gradient in any step so far, so it does not train: the loss bypasses the layer, as TRL's bypasses "
                "`lm_head`. Leave it out of `target_modules`, or train it in full (`modules_to_save`)."
            )

    def count(self, finite: Tensor, step: int) -> None:
        """Count the step if its gradients are not ``finite``, a 0-dim bool tensor. Warn after the first such step."""
        skipped = self._factors.tensors.get("skipped").add_(~finite)
        if self._warned_of_skipped or (skipped.device.type != "cpu" and step % 100):
            return  # on other devices, reading the count would wait for the device
        if int(skipped):
            self._warned_of_skipped = True
            warnings.warn(
                f"Step {step}: the adapter's gradients hold NaN or infinite values, so the step is left out of "
                "the importance scores, if there are any. Further such steps are counted in "
                "`allocation_state.skipped_steps`. Lower the learning rate or clip gradients if they go on.",
                stacklevel=2,
            )
