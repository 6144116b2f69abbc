"""From the gradients of a step to the scores of triplets, where a form scores them; and which gradients there were."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.method.importance import Importance
from rankwise.method.scores import update_scores
from rankwise.parallel.sharded import gather, local
from rankwise.parallel.zero import ZeroParts
from rankwise.run.optimizers import ORDER
from rankwise.run.triplets import Triplets


class Watch:
    """Looks at the gradients of each step: whether there are any, where there are none, and whether they are finite.

    Args:
        triplets: the adapter's.
        tell: says something to the user, once.
    """

    decisive = "lora_B"  # the factor without which, if it does not train, a layer keeps the ranks that it has

    def __init__(self, triplets: Triplets, tell: Callable[[str], None]) -> None:
        self._triplets, self._tell = triplets, tell
        self._idle = set(range(len(triplets.layers)))  # layers that have had no gradient in any step
        self._told_of_skipped = False

    entries = 1  # of each running average, and unused: some file formats take two empty tensors for one

    def frozen(self) -> list[bool]:
        """Which layers don't train, and so keep the triplets that they have."""
        return [not parameter.requires_grad for parameter in self._triplets.factors(self.decisive)]

    def update(self, step: int) -> None:
        """Take in the gradients of step ``step``, which are still there."""
        gradients = self._gradients(("lora_B",))
        there = [local(gradient) for gradient in gradients if gradient is not None]
        if there:
            norms = torch._foreach_norm(there)
            device = self._triplets.mask.device
            self._count(torch.stack([norm.to(device) for norm in norms]).isfinite().all(), step)

    def update_from_parts(
        self, parts: ZeroParts, held: frozenset[int], optimizer: Optimizer, step: int
    ) -> None:
        """As `update`, where DeepSpeed ZeRO steps parts of the adapter: those numbered ``held``, now."""
        norms = [piece.gradient.norm() for piece in parts.pieces(optimizer) if piece.number in held]
        bad = bool(norms) and not bool(torch.stack(norms).isfinite().all())
        self._count(torch.tensor(not parts.any(bad), device=self._triplets.mask.device), step)

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

    def _gradients(self, keys: Sequence[str]) -> list[Any]:
        """All gradients of some factors, in the order of layers; None where there is none."""
        gradients = [p.grad for key in keys for p in self._triplets.factors(key)]
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


class Scoring(Watch):
    """Keeps the running averages of one adapter, too.

    Args:
        triplets: the adapter's.
        importance: what is scored.
        betas: ``beta1`` and ``beta2``.
        tell: says something to the user, once.
    """

    def __init__(
        self,
        triplets: Triplets,
        importance: Importance,
        betas: tuple[float, float],
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(triplets, tell)
        self.importance, self.betas = importance, betas
        self.decisive, self.entries = importance.decisive, importance.entries

    def per_triplet(self) -> Tensor:
        """One score for each triplet, (triplets,)."""
        triplets = self._triplets
        return self.importance.per_triplet(triplets.buffer("sensitivity"), triplets.buffer("uncertainty"))

    def update(self, step: int) -> None:
        gradients = self._gradients(self.importance.factors)
        if all(gradient is None for gradient in gradients):
            return
        weights = [p.detach() for key in self.importance.factors for p in self._triplets.factors(key)]
        filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
        if any(weight.element_size() < 4 for weight in weights):
            weights, filled = [w.float() for w in weights], [g.float() for g in filled]
        products = gather(torch._foreach_mul(weights, filled))
        known = [None if g is None else product for g, product in zip(gradients, products, strict=True)]
        self._move(known, step)

    def update_from_parts(
        self, parts: ZeroParts, held: frozenset[int], optimizer: Optimizer, step: int
    ) -> None:
        layers = len(self._triplets.layers)
        measured = [ORDER.index(key) * layers + n for key in self.importance.factors for n in range(layers)]
        numbers = [number for number in measured if number in held]
        pieces = parts.pieces(optimizer)
        products = parts.gathered(numbers, pieces, lambda piece: piece.master * piece.gradient)
        known = dict(zip(numbers, products, strict=True))
        self._move([known.get(number) for number in measured], step)

    def _move(self, products: list[Tensor | None], step: int) -> None:
        """Move the averages on by weight times gradient of all that is measured; None where there is no gradient."""
        sensitivity, uncertainty = (self._triplets.buffer(name) for name in ("sensitivity", "uncertainty"))
        importance, known = self.importance.measure(products, sensitivity.device)
        self._count(update_scores(sensitivity, uncertainty, importance, *self.betas, known), step)
