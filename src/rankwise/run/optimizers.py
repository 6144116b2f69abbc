"""Finds the optimizers that hold an adapter's factors, and tells which of their steps are steps of the run."""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.parallel.holder import Step, TensorStep
from rankwise.parallel.optimizer_state import is_quantized
from rankwise.parallel.zero import partitioned, shape_of, who_steps
from rankwise.parallel.zero_holder import ZeroStep
from rankwise.run.factors import Factors
from rankwise.run.pairs import KEYS, FactorsGone
from rankwise.run.step_counter import StepCounter
from rankwise.run.under_peft import FROZEN_BY_PEFT, parameters_of_peft


class Optimizers:
    """The optimizers of one adapter. Copies and pickles keep only the leader.

    Args:
        factors: the factors of the run.
        warn: a function that gives each warning once.
        leader: the number of the factor whose optimizer counts the steps, if the run continues from a checkpoint.
    """

    def __init__(self, factors: Factors, warn: Callable[[str], None], leader: int | None = None) -> None:
        self._factors, self._warn = factors, warn
        self._counter = StepCounter(leader)
        self._quantized: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._held: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
        # A step of the run is complete when the expected optimizers have stepped, too: those that stepped after the
        # leader's optimizer in the step before, and that have new gradients now.
        self._later: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._expected: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._incomplete = False
        # For each optimizer, a gradient that it has stepped with, and that gradient's version.
        self._used: weakref.WeakKeyDictionary[Optimizer, tuple[weakref.ref[Tensor], int]] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> Any:
        return Optimizers, (self._factors, self._warn, self.leader)

    @property
    def leader(self) -> int | None:
        """The number of the factor whose optimizer counts the steps; None before the first step."""
        return self._counter.leader

    def known(self) -> list[Optimizer]:
        """All optimizers that have stepped and still exist.

        If none that holds factors has stepped, all that exist are asked: a resumed run may end before its first step,
        and its optimizer has the state from before. Under ZeRO, no optimizer holds whole factors.
        """
        if any(held for _, held in self._held.values()) or self._factors.zero_parts() is not None:
            return list(self._held)
        own = set(map(id, self._factors.all_parameters()))
        # By their state, because a wrapper shows the state of the optimizer in it.
        found: dict[int, Optimizer] = {}
        for each in gc.get_objects():
            groups = getattr(each, "param_groups", ()) if issubclass(type(each), Optimizer) else ()
            if any(id(parameter) in own for group in groups for parameter in group["params"]):
                found[id(each.state)] = each
        return list(found.values())

    def holds(self, optimizer: Optimizer, prunes: bool) -> bool:
        """Whether ``optimizer`` steps any factor of the adapter.

        Raises:
            ValueError: as in `_in_parts`.
        """
        return bool(self._held_by(optimizer) or self._in_parts(optimizer, prunes))

    def moves_zeros(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` quantizes its state. It then moves ranks that have no gradient."""
        known = self._quantized.get(optimizer)
        if known is None:
            if not optimizer.state:  # as with SGD without momentum
                return False
            own = (optimizer.state.get(self._factors.parameter(n)) for n in self._held_by(optimizer))
            states = [state for state in own if state]
            if not states:
                return False
            known = self._quantized[optimizer] = any(map(is_quantized, states))
        return known

    def begins(self, optimizer: Optimizer) -> Step | None:
        """The step that ``optimizer`` begins; None if a wrapper that holds it is stepping."""
        if held := self._in_parts(optimizer, False):
            return self._zero_step(optimizer, held)
        if not self._counter.begin(optimizer):
            return None
        return TensorStep(self._factors.parameter, self._held_by(optimizer), optimizer)

    def overdue(self, optimizer: Optimizer) -> bool:
        """Whether a step of the run was still waiting for others when ``optimizer`` began. It then stops waiting."""
        overdue = self._incomplete and optimizer not in self._expected and bool(self._held_by(optimizer))
        self._incomplete = self._incomplete and not overdue
        return overdue

    def now(self) -> TensorStep:
        """The current gradients of all factors, as a step. It looks each factor up once."""
        count = len(self._factors.keys) * len(self._factors.pairs)
        return TensorStep(functools.cache(self._factors.parameter), range(count))

    def ended(self, optimizer: Optimizer) -> tuple[Step | None, bool]:
        """Report that ``optimizer`` has stepped.

        The gradients of all factors are observed once in each step of the run: when the leader's optimizer has
        stepped.

        Returns:
            The step, if its gradients are to be observed, else None; and whether a step of the run is complete.
        """
        if held := self._in_parts(optimizer, False):
            parts = self._factors.zero_parts()
            return self._zero_step(optimizer, held), parts is not None and parts.stepped(held)
        skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer skips steps by itself
        if skipped is not None and bool(skipped):
            return None, False
        parameter = self._factors.parameter
        mine, own_step = self._held_by(optimizer), self._counter.is_stepping(optimizer)
        if self._counter.end(optimizer, mine, lambda number: parameter(number).requires_grad):
            self._expected = weakref.WeakSet(filter(self._has_fresh_gradients, self._later))
            self._later = weakref.WeakSet()
            self._expected.discard(optimizer)
            self._incomplete = len(self._expected) > 0
            return self.now(), not self._incomplete
        if not own_step or not any(parameter(number).requires_grad for number in mine):
            return None, False
        self._later.add(optimizer)
        if (gradient := self._first_gradient(optimizer)) is not None:
            self._used[optimizer] = (weakref.ref(gradient), gradient._version)
        self._expected.discard(optimizer)
        complete = self._incomplete and not len(self._expected)
        self._incomplete = self._incomplete and not complete
        return None, complete

    def _first_gradient(self, optimizer: Optimizer) -> Tensor | None:
        own = map(self._factors.parameter, self._held_by(optimizer))
        return next((each.grad for each in own if each.grad is not None), None)

    def _has_fresh_gradients(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` has gradients that it has not stepped with yet."""
        gradient = self._first_gradient(optimizer)
        if gradient is None:
            return False
        used, version = self._used.get(optimizer, (None, 0))
        return used is None or used() is not gradient or gradient._version != version

    def _zero_step(self, optimizer: Optimizer, held: frozenset[int]) -> ZeroStep | None:
        parts = self._factors.zero_parts()
        return None if parts is None else ZeroStep(parts, sorted(held), optimizer)

    def _held_by(self, optimizer: Optimizer) -> tuple[int, ...]:
        """The numbers of the factors that the optimizer holds."""
        first = self._factors.pairs[0].parameter(KEYS[0])
        mark = (id(first), tuple(len(group["params"]) for group in optimizer.param_groups))
        known = self._held.get(optimizer)
        if known is None or known[0] != mark:
            known = self._held[optimizer] = (mark, self._look(optimizer))
        held: tuple[int, ...] = known[1]
        return held

    def _look(self, optimizer: Optimizer) -> tuple[int, ...]:
        own = self._factors.all_parameters()
        if any(not isinstance(p, nn.Parameter) or p.dim() < 2 and not partitioned(p) for p in own):
            raise ValueError(
                "The adapter's parameters are no longer matrices: FullyShardedDataParallel (FSDP version 1) "
                "flattens them, and ranks are rows and columns. Use `fully_shard` (FSDP version 2)."
            )
        changed = [n for n, p in enumerate(own) if shape_of(p) != self._factors.shape(n)]
        if changed:
            path = self._factors.pairs[changed[0] % len(self._factors.pairs)].path
            raise FactorsGone(f"The adapter of {path!r} has another rank than when its run began.")
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = tuple(number for number, parameter in enumerate(own) if id(parameter) in trained)
        if not found:
            self._explain_why_not(trained)
        return found

    def _explain_why_not(self, trained: set[int]) -> None:
        """Warn if an optimizer without factors was meant to train the adapter.

        Args:
            trained: the ids of the optimizer's parameters.
        """
        if trained & self._factors.base_weights():
            self._warn(
                "An optimizer holds weights of the adapted layers but no weights of the adapter, so it doesn't train "
                "the adapter. Build the optimizer after the adapter is attached."
            )
        model = self._factors.tensors.model
        frozen = not any(parameter.requires_grad for parameter in self._factors.all_parameters())
        if model is not None and frozen and trained & parameters_of_peft(model):
            self._warn(
                f"{FROZEN_BY_PEFT} Give PEFT the base model instead (`model.unload()` takes rankwise's layers out), "
                "and call `rankwise.adapt_ranks(peft_model)` if the ranks of PEFT's adapter are to adapt."
            )

    def _in_parts(self, optimizer: Optimizer, prunes: bool) -> frozenset[int]:
        """The factors that DeepSpeed ZeRO steps with ``optimizer``; usually none.

        Raises:
            ValueError: the run ``prunes``, and DeepSpeed steps a copy of the parameters that can't be reached.
        """
        if "deepspeed" not in sys.modules or self._held_by(optimizer):
            return frozenset()
        (caller, owner), parts = who_steps(), self._factors.zero_parts()
        if caller.startswith("deepspeed.runtime.fp16") and parts is None and prunes:
            raise ValueError(
                "DeepSpeed's half precision without ZeRO steps a flat copy of the parameters, so no rank would ever "
                'change. Set "stage" under "zero_optimization" in its configuration to 1, 2 or 3.'
            )
        return frozenset() if parts is None else parts.held(owner, optimizer)
