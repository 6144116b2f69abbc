"""The order of an optimizer step: listens to the optimizer and moves the budget of ranks.

Before a step, the paper's form adds the penalty's gradient. After it, the controller observes the gradients and makes a
cut if the schedule asks for one. A `Choice` decides which ranks are kept. `Factors` knows where the factors are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from rankwise.adapters.branch import WithoutAutocast
from rankwise.config import AdaLoraConfig
from rankwise.config.checks import check_whole
from rankwise.method.allocation import Budget, budget_with_reserved, choose
from rankwise.method.schedule import BudgetSchedule, Phase
from rankwise.parallel.ddp import steps_alone
from rankwise.parallel.processes import running
from rankwise.parallel.sharded import local
from rankwise.run.choice.choice import Choice
from rankwise.run.factors import Factors
from rankwise.run.history import RankHistory
from rankwise.run.hooks import Closure, listen, stop_listening
from rankwise.run.optimizers import Optimizers
from rankwise.run.pairs import FactorsGone
from rankwise.run.penalty import AddedPenalty
from rankwise.run.state import AllocationState
from rankwise.run.unreached import unreached_ranks
from rankwise.run.warn_once import WarnOnce

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _without_autocast(method: _Method) -> _Method:
    """Let a method of a `Controller` compute in the factors' dtype, also if the user steps inside of autocast."""

    @functools.wraps(method)
    def inside(self: Controller, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), WithoutAutocast(self.factors.mask):
            return method(self, *args, **kwargs)

    return cast(_Method, inside)


_UNUSED = 1  # statistics of a run that prunes nothing: some file formats confuse two empty tensors


class Controller:
    """Runs adaptive ranks for one adapter.

    Args:
        adapter: the adapter's name.
        factors: the adapter's factors. The run's tensors are created here.
        choice: the way in which ranks are chosen.
        config: the run's settings.
        warn: a function that gives each warning once.
    """

    def __init__(
        self, adapter: str, factors: Factors, choice: Choice, config: AdaLoraConfig, warn: WarnOnce
    ) -> None:
        self.adapter, self.factors, self.choice = adapter, factors, choice
        self.config, self.warn = config, warn
        self.schedule: BudgetSchedule | None = config.resolved_schedule() if config.total_step else None
        self.step = 0
        self.fixed = False  # the choice of ranks is final
        self.automatic = True  # steps are counted by listening, not by calls of update_and_allocate
        self.history = RankHistory(factors.names)
        self.history.record(0, self.initial, list(factors.layout.block_ranks))
        self._penalty = AddedPenalty(factors, config.orth_reg_weight)
        self.optimizers = Optimizers(factors, warn)
        self._stopped = False
        self._heard = False  # hooks have reported a step, so steps are observed without a call by hand
        self.changed: Callable[[], None] | None = None  # called when scales or ranks may have changed
        # The name by which the user calls methods of the run, for warnings. None: a command runs it.
        self.handle: str | None = "model"
        self._began_at_zero = not self._has_values()
        factors.tensors.create(choice.entries if self.prunes else _UNUSED, self.initial)
        listen(self)

    def detach(self) -> None:
        """Stop listening and remove the run's tensors."""
        self.stop()
        self.factors.tensors.remove()

    def stop(self) -> None:
        """Stop listening. Steps no longer count, also in copies."""
        self._stopped = True
        stop_listening(self)

    def known_optimizers(self) -> list[Optimizer]:
        """All optimizers that have stepped the adapter and still exist."""
        return self.optimizers.known()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_heard": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._stopped:
            return
        listen(self)
        if running(AveragedModel.__init__) and self.prunes and not self.fixed:
            self.warn(
                "`AveragedModel` copies the model while its ranks adapt. The copy keeps its present scale and ranks, "
                "and a later cut rotates the model's directions, so an average with later values means nothing. Make "
                '`AveragedModel(model)` once `allocation_state.phase` is "final".'
            )

    # Budget and schedule.

    @property
    def initial(self) -> int:
        """The sum of all layers' ranks at the start."""
        return self.factors.layout.triplets

    @property
    def target(self) -> int:
        """The sum of ranks at the end: ``target_r`` per block, or all ranks if the adapter has fewer."""
        return self.factors.layout.target(self.config.target_r, self.choice.counts_parameters)

    @property
    def prunes(self) -> bool:
        """Whether there is anything to cut."""
        return self.target < self.initial

    def set_total_step(self, total_step: int) -> None:
        """Set the number of optimizer steps in the run; see `AdaLoraConfig.with_total_step`."""
        config = self.config.with_total_step(total_step)
        self.schedule, self.config = config.resolved_schedule(), config

    def begin_anew(self, total_step: int) -> None:
        """Forget the steps so far: a trainer has given up an attempt and restarts with ``total_step`` steps.

        Ranks that were cut stay cut.
        """
        self.set_total_step(total_step)
        for name in ("sensitivity", "uncertainty", "skipped"):
            self.factors.tensors.get(name).zero_()
        budget = self._budget()
        self.history = RankHistory(self.factors.names)
        self.history.record(0, budget, self.factors.block_ranks())
        self.step = 0
        self.optimizers = Optimizers(self.factors, self.warn)

    def state(self) -> AllocationState:
        """The current state of the run. Reading it waits for the device."""
        if self.fixed:
            phase = Phase.FINAL
        else:
            phase = self.schedule.phase(max(self.step, 1)) if self.schedule else Phase.WARMUP
        return AllocationState(
            step=self.step,
            phase=str(phase),
            budget=self._budget(),
            target=self.target,
            initial=self.initial,
            skipped_steps=int(self.factors.tensors.get("skipped")),
            total_step=self.schedule.total_step if self.schedule else None,
        )

    @property
    def under_way(self) -> bool:
        """Whether the run has begun and has not ended."""
        return self.step > 0 and (self.schedule is None or self.step < self.schedule.total_step)

    def warn_if_unfinished(self) -> None:
        """Warn, once per step, that the budget has not reached its target yet, in case the run ends here."""
        self.warn_if_unseen()
        if self.fixed or not self.prunes or not self.step or self.reached_target:
            return
        if self.handle:
            finish = (
                f"call `{self.handle}.finalize_ranks()`, which brings it to the target, and save (again)."
            )
        else:
            rank = f"{self.config.target_r:g}"
            finish = (
                f"run `rankwise compress ADAPTER --rank {rank} -o OUT`, which brings the saved adapter to it."
            )
        self.warn(
            f"At step {self.step} the budget is {self._budget()} ranks; its target is {self.target}, which the "
            f"schedule reaches at step {self.schedule.last_allocation if self.schedule else '?'}. If training ends "
            f"here, {finish}"
        )

    def warn_if_unseen(self) -> None:
        """Warn, once, if values have changed without any step of an optimizer, so that no rank was cut."""
        if self.step or self.fixed or not self.prunes or not self._began_at_zero or not self._has_values():
            return
        call = f"call `{self.handle}.update_and_allocate(step)` after each step, before the gradients are set to zero."
        self.warn(
            "No rank was cut: the adapter's values have changed since its run began, but no step of a "
            "`torch.optim.Optimizer` that holds them was seen. If your loop changes them in another way, "
            f"{call if self.handle else 'its ranks cannot adapt.'}"
        )

    def _has_values(self) -> bool:
        """Whether this process holds a number other than 0 in the factors that start at 0."""
        kind = "E" if "E" in self.factors.keys else None
        own = (local(pair.parameter(kind or pair.starts_at_zero)).detach() for pair in self.factors.pairs)
        return any(bool(each.any()) for each in own if not each.is_meta)

    @property
    def reached_target(self) -> bool:
        """Whether the budget has reached its target. Until the choice is fixed, other ranks may still take it."""
        return self._budget() <= self.target

    def _budget(self) -> int:
        """The budget of the last cut, in ranks of average size. Reading it waits for the device."""
        counted = self.choice.counts_parameters
        return self.history.records[-1].budget if counted else int(self.factors.mask.sum())

    # One optimizer step.

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer trains any factor of this adapter."""
        if self.factors.tensors.are_gone:  # an error that a notebook keeps can hold the run without its model
            self.stop()
            return False
        try:
            return self.optimizers.holds(optimizer, self.prunes and not self.fixed)
        except FactorsGone as gone:
            self.stop()
            self.warn(f"{gone} The run of adaptive ranks has ended with it.")
            return False

    def before_step(self, optimizer: Optimizer, closure: Closure | None = None) -> Closure | None:
        """Add the penalty's gradient to the gradients: now, or after ``closure`` has computed them.

        Returns:
            The closure that the optimizer must use; None if there was none.

        Raises:
            ValueError: the length of the run is unknown, a backward pass is under way, each process steps alone, or the
                optimizer can't be combined with the penalty.
        """
        if self.schedule is None and self.automatic and self.prunes and not self.fixed:
            trainers = (
                " In Transformers' trainers use the callback `rankwise.AdaptRanks`, which knows the length."
            )
            raise ValueError(
                "The length of the run is not known: pass `total_step`, or call `set_total_step(n)` with the number of "
                f"optimizer steps before the first one.{trainers if self.handle == 'ranks' else ''}"
            )
        if self.prunes and not self.fixed and torch._C._current_graph_task_id() >= 0:
            raise ValueError(
                "An optimizer steps inside the backward pass. A cut there would change factors that the rest of the "
                "pass reads: call `optimizer.step()` after `loss.backward()`."
            )
        if self.prunes and not self.fixed and not self.step and steps_alone(self.factors.all_parameters()):
            raise ValueError(
                "An optimizer steps while `no_sync` of DistributedDataParallel is on, as with local SGD. Each process "
                "would cut other ranks and rotate its layers in another way, so averages of their values would mean "
                "nothing. Step outside of `no_sync`."
            )
        self._penalty.refuse_unfit(optimizer)
        if self.optimizers.overdue(optimizer):
            self._completed()
        step = self.optimizers.begins(optimizer)
        return closure if step is None else self._penalty.add_before(step, optimizer, closure)

    @_without_autocast
    def after_step(self, optimizer: Optimizer) -> None:
        """Observe the gradients. Then count the step and cut, unless `update_and_allocate` does that."""
        step, complete = self.optimizers.ended(optimizer)
        if step is not None and self._observes_at(self.step + 1):
            self.choice.observe(step, self.step + 1)
        if len(self.history) > 1:
            self.choice.keep_off(self.optimizers.moves_zeros(optimizer))
        if complete:
            self._completed()

    @_without_autocast
    def update_and_allocate(self, global_step: int) -> None:
        """Count a step and cut on the caller's request. From this call on, only such calls do so.

        If the optimizer's last step has been counted or observed already, that is not repeated.
        """
        check_whole("global_step", global_step, 0)
        if self.schedule is None and self.prunes and not self.fixed:
            raise ValueError(
                "The length of the run is not known: pass `total_step`, or call `set_total_step(n)` first."
            )
        self.automatic = False
        if not self._heard and self._observes_at(global_step):
            self.choice.observe(self.optimizers.now(), global_step)
        self._advance(global_step)

    def _observes_at(self, step: int) -> bool:
        return self.prunes and not self.fixed and bool(self.schedule and step < self.schedule.last_allocation)

    @_without_autocast
    def _completed(self) -> None:
        self._heard = True
        if self.automatic:
            self._advance(self.step + 1)

    def _advance(self, step: int) -> None:
        self.step, schedule = step, self.schedule
        if schedule is None:
            return
        if not self.fixed:
            if self.prunes and (schedule.allocates(step) or step > schedule.last_allocation):
                if self._heard:
                    self.choice.checks.warn_of_idle_layers()
                self._cut(schedule.budget(step, self.initial, self.target))
            if step >= schedule.last_allocation:
                self.fix()
        if step > schedule.total_step:
            self.warn(
                f"Training goes on past total_step={schedule.total_step}. The ranks stay as they are; "
                "only their values train on."
            )
        if self.changed is not None:
            self.changed()

    # A cut.

    def _cut(self, ranks: int) -> None:
        """Keep the ranks that fit a budget of ``ranks`` ranks of average size."""
        factors, layout = self.factors, self.factors.layout
        for pair in factors.pairs:
            pair.check_writable()
        final, device = ranks == self.target, factors.mask.device
        found = self.choice.candidates()
        costs = layout.parameters_per_rank(device) if self.choice.counts_parameters else None
        budget = Budget(ranks, None if costs is None else ranks * layout.cost // self.initial)
        unchanged = self.choice.checks.frozen()
        for n in found.unchanged:
            unchanged[n] = True
        reserved = held = None
        if any(unchanged):
            reserved = factors.spread_layers(unchanged, device)
            held = factors.mask & reserved
            initial, share = layout.without(unchanged, self.config.target_r)
            if not final and self.schedule is not None:
                share = self.schedule.budget(self.step, initial, share)
            budget = budget_with_reserved(budget, share, initial, reserved, held, costs)
        unreached = unreached_ranks(factors)
        tie_order = factors.index("tie_order", layout.round_robin, device)
        acts = found.acts
        # A rank that the last cut can't afford would take budget from those that it can.
        if costs is not None:
            acts = acts & (costs <= self.target * layout.cost // self.initial)
            acts = acts if held is None else acts | held
        mask = choose(found.scores, acts, budget, tie_order, costs, reserved, held, unreached)
        if final and unreached is not None:  # a remaining budget is of no use to experts without tokens
            mask &= ~unreached
        factors.mask.copy_(mask)
        self.choice.apply(factors.mask, unchanged, final, self.optimizers.known())
        self.history.record(self.step, budget.ranks, factors.block_ranks())

    @_without_autocast
    def finalize_ranks(self) -> None:
        """Bring the budget to its target now, and fix the choice."""
        if not self.fixed:
            if self.prunes:
                self._cut(self.target)
            self.fix()
            if self.changed is not None:
                self.changed()

    def fix(self) -> None:
        """Fix the ranks for the rest of the run. Layers may then drop those that are off."""
        self.fixed = True
        self.factors.narrow()

    def take_over(self, kept: Mapping[str, Tensor], history: RankHistory | None = None) -> None:
        """Fix the choice to the ranks of a saved adapter.

        Args:
            kept: for each layer's path, the ranks to keep, (ranks,), bool.
            history: the history that led to them. If it is missing or of other layers, the run's own history gets a
                record of the choice.
        """
        self.factors.mask.copy_(torch.cat([kept[pair.path] for pair in self.factors.pairs]))
        if history is not None and history.layers == self.history.layers:
            self.history = history
        else:
            self.history.record(self.step, int(self.factors.mask.sum()), self.factors.block_ranks())
        self.fix()

    # Questions of other modules.

    def allocated_ranks(self) -> dict[str, int]:
        """The rank of each block after the last cut, by the block's name (usually the layer's path)."""
        return dict(zip(self.factors.names, self.factors.block_ranks().tolist(), strict=True))

    def layer_importance(self) -> list[float]:
        """The worth of each block's kept ranks together; NaN if nothing can be cut."""
        if not self.prunes:
            return [float("nan")] * len(self.factors.names)
        scores = self.choice.rank_importance()
        return [float(part.sum()) for part in scores.cpu().split(self.factors.layout.block_ranks)]

    def penalty(self) -> Tensor:
        """The current orthogonality penalty without its weight, a 0-dim tensor."""
        return self._penalty.value()
