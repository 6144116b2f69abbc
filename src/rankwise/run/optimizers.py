"""Which optimizers hold an adapter's parameters, and which of their steps are steps of the run."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rankwise.parallel.zero import ZeroParts, partitioned, who_steps
from rankwise.run.triplets import FACTORS, Triplets
from rankwise.run.whose_step import Turns

PREFERENCE = ("lora_E", "lora_A", "lora_B")  # the optimizer that holds the first of these counts the steps


class Optimizers:
    """What is known of the optimizers of one adapter; none of it is copied or pickled but who leads.

    Args:
        triplets: the adapter's.
        tell: says something to the user, once.
        leader: the leader so far, if the run goes on from a checkpoint; see `Turns`.
    """

    def __init__(self, triplets: Triplets, tell: Callable[[str], None], leader: int | None = None) -> None:
        self._triplets, self._tell = triplets, tell
        self._turns = Turns(leader)
        self._held: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
        self._parts: ZeroParts | None = None  # of a model in DeepSpeed ZeRO

    def __reduce__(self) -> Any:
        return Optimizers, (self._triplets, self._tell, self.leader)

    @property
    def leader(self) -> int | None:
        """Number of the parameter whose optimizer counts the steps; None before the first."""
        return self._turns.leader

    def begin(self, optimizer: Optimizer) -> bool:
        """``optimizer`` is about to step; see `Turns.begin`."""
        return self._turns.begin(optimizer)

    def counts(self, optimizer: Optimizer) -> bool:
        """Whether the step that ``optimizer`` has taken is a step of the run."""
        layers = list(self._triplets.layers.values())

        def trains(number: int) -> bool:
            kind, place = divmod(number, len(layers))
            parameter: nn.Parameter = getattr(layers[place], PREFERENCE[kind])[self._triplets.adapter]
            return parameter.requires_grad

        return self._turns.end(optimizer, self.held_by(optimizer), trains)

    def known(self) -> list[Optimizer]:
        """All optimizers that have stepped and still exist."""
        return list(self._held)

    def held_by(self, optimizer: Optimizer) -> tuple[int, ...]:
        """Numbers, in `PREFERENCE`'s order, of the adapter's parameters that the optimizer holds."""
        triplets = self._triplets
        first = next(iter(triplets.layers.values())).lora_A[triplets.adapter]
        mark = (id(first), tuple(len(group["params"]) for group in optimizer.param_groups))
        known = self._held.get(optimizer)
        if known is None or known[0] != mark:
            known = self._held[optimizer] = (mark, self._look(optimizer))
        held: tuple[int, ...] = known[1]
        return held

    def _look(self, optimizer: Optimizer) -> tuple[int, ...]:
        own = [parameter for kind in PREFERENCE for parameter in self._triplets.factors(kind)]
        if any(not isinstance(p, nn.Parameter) or p.dim() != 2 and not partitioned(p) for p in own):
            raise ValueError(
                "The adapter's parameters are no matrices any more: FullyShardedDataParallel (FSDP version 1) "
                "flattens them, and AdaLoRA needs rows and columns. Use `fully_shard` (FSDP version 2)."
            )
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = tuple(number for number, parameter in enumerate(own) if id(parameter) in trained)
        layers = self._triplets.layers.values()
        if not found and any(id(layer._parameters.get("weight")) in trained for layer in layers):
            self._tell(
                "An optimizer steps that holds weights of the adapted layers but none of the adapter's, so it "
                "doesn't train the adapter. Build the optimizer after `get_peft_model`."
            )
        return found

    # DeepSpeed ZeRO.

    def zero_parts(self) -> ZeroParts | None:
        """The adapter's A, E and B as DeepSpeed ZeRO holds them; None if it doesn't."""
        if self._parts is None and "deepspeed" in sys.modules:
            own = [parameter for key in FACTORS for parameter in self._triplets.factors(key)]
            if any(map(partitioned, own)):
                self._parts = ZeroParts(own)
        return self._parts

    def in_parts(self, optimizer: Optimizer, prunes: bool) -> frozenset[int]:
        """Which of `zero_parts` DeepSpeed is about to step or has stepped with ``optimizer``; mostly none.

        Raises:
            ValueError: the run ``prunes``, and DeepSpeed steps what no one else can reach.
        """
        if "deepspeed" not in sys.modules or self.held_by(optimizer):
            return frozenset()
        (caller, owner), parts = who_steps(), self.zero_parts()
        if caller.startswith("deepspeed.runtime.fp16") and parts is None and prunes:
            raise ValueError(
                "DeepSpeed's half precision without ZeRO steps a flat copy of the parameters, so no rank would ever "
                'change. Set "stage" under "zero_optimization" in its configuration to 1, 2 or 3.'
            )
        return frozenset() if parts is None else parts.held(owner, optimizer)
