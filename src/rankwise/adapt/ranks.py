"""`adapt_ranks`: adaptive ranks on LoRA layers of PEFT or of any other library."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from rankwise.adapt.lone_values import LoneValues
from rankwise.adapt.narrow import can_be_narrowed, narrow
from rankwise.adapt.peft_config import write_config
from rankwise.adapt.peft_pairs import PeftPair, lora_model, other_paths, peft_pairs
from rankwise.adapt.refusals import (
    check_adapter,
    check_model,
    check_pairs,
    check_values,
    chosen_adapter,
)
from rankwise.attach.unused_layers import check_fast_path
from rankwise.config import AdaLoraConfig
from rankwise.config.checks import check_positive
from rankwise.parallel.processes import many_processes
from rankwise.parallel.sharded import in_sharded_checkpoint, is_sharded, put_back
from rankwise.parallel.wrappers import refuse_wrapped
from rankwise.run.checkpoint import as_text, from_text, load_packed_state, packed_state
from rankwise.run.choice.principal import PrincipalChoice
from rankwise.run.controller import Controller
from rankwise.run.factors import Factors
from rankwise.run.history import RankHistory
from rankwise.run.pairs import FactorPair, FactorsGone
from rankwise.run.run_tensors import OwnTensors
from rankwise.run.state import AllocationState
from rankwise.run.summary import LayerRank, RankSummary
from rankwise.run.warn_once import WarnOnce

HANDLES = "_rankwise_adaptive_ranks"  # attribute of a model that maps adapters to their handles


@torch.inference_mode(False)
def adapt_ranks(
    model: nn.Module | Sequence[FactorPair],
    target_r: float | None = None,
    total_step: int | None = None,
    adapter: str | None = None,
    tinit: int | float | None = None,
    tfinal: int | float | None = None,
    deltaT: int | None = None,
) -> AdaptiveRanks:
    """Adapt the ranks of a LoRA adapter while it trains. A fixed budget moves to the layers that use it.

    The adapter and its layers stay PEFT's own, and no layer is replaced. The rank in the adapter's ``LoraConfig`` is
    the rank at the start. From this call on, ranks adapt whenever an optimizer that holds the adapter's factors steps,
    in any training loop. When the run ends, the layers are narrowed to the ranks that are left, and the result is an
    ordinary LoRA adapter.

    The scale of your configuration (``lora_alpha / r``) is the scale at the end of the run. While more ranks act it is
    smaller in proportion, so that the adapter learns at an even pace.

    Args:
        model: a model with a LoRA adapter of PEFT: the result of ``peft.get_peft_model``, or a model into which
            adapters were injected, for example by Transformers' ``add_adapter``. Or a list of `FactorPair`, one for
            each LoRA layer of another library or of your own. With a list, keep the handle, because no model keeps it.
        target_r: average rank at the end, greater than 0 and at most the rank of the adapter. Below 1 some layers end
            at rank 0. None: half of the adapter's rank.
        total_step: optimizer steps of the whole run, at least 1. None: call `AdaptiveRanks.set_total_step` before the
            first step.
        adapter: name of the adapter. None: the active one.
        tinit: length of the warm-up, in optimizer steps (int) or as a fraction of the run (float in [0, 1)). None: 2 %
            of the run.
        tfinal: length of the final phase, in which no rank changes, in optimizer steps (int) or as a fraction of the
            run (float in [0, 1)). None: 60 % of the run.
        deltaT: optimizer steps between two cuts, at least 1. None: the number that gives twenty cuts.

    Returns:
        A handle on the run. The model keeps it as long as the model exists.

    Raises:
        TypeError: ``model`` is neither a module nor a list of `FactorPair`, or a number has the wrong type.
        ValueError: the model has no LoRA adapter of PEFT, or one whose meaning would change when ranks are cut (PiSSA,
            OLoRA and LoftQ starts, ``lora_bias``, shared factors, variants other than DoRA); the factors of a
            `FactorPair` do not form a product ``B A``; ``target_r`` is above its rank; or the schedule leaves no step
            for pruning. The model is then as before.

    Example:
        >>> import peft, torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"]))
        >>> ranks = rw.adapt_ranks(model, target_r=2, total_step=20)
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        >>> for _ in range(20):
        ...     model(torch.randn(16, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> ranks.rank_summary().total_rank <= 4
        True
    """
    if not _are_pairs(model):
        whole: Any = lora_model(model) or model
        name, pairs = check_adaptable(whole, adapter, target_r)
        check_values(pairs)
        first = vars(whole).get(HANDLES, {}).get(name)
        if first is not None:
            if not first.is_over:
                raise ValueError(
                    f"The ranks of adapter {name!r} adapt already. Call `detach()` on the first handle to start again."
                )
            first.detach()
        # This is a copy, because the caller may use the configuration again, and TRL's copy of an adapter shares it.
        peft_config = copy.deepcopy(whole.peft_config[name])
        handle = AdaptiveRanks(pairs, name, target_r, total_step, tinit, tfinal, deltaT, whole, peft_config)
        whole.peft_config[name] = peft_config
        vars(whole).setdefault(HANDLES, {})[name] = handle
        return handle
    own = cast("Sequence[FactorPair]", model)
    check_pairs(own)
    return AdaptiveRanks(own, adapter or "default", target_r, total_step, tinit, tfinal, deltaT)


def check_adaptable(model: Any, adapter: str | None, target_r: float | None) -> tuple[str, list[PeftPair]]:
    """Check that the ranks of an adapter can be adapted, and return its name and the factors of its layers.

    Raises:
        TypeError: as `adapt_ranks`.
        ValueError: as `adapt_ranks`.
    """
    check_model(model)
    name = chosen_adapter(model, adapter)
    pairs = peft_pairs(model, name)
    check_adapter(model.peft_config[name], name, pairs)
    put_back()
    refuse_wrapped(model, [p.name for p in pairs if not is_sharded(p.parameter("A"))], attached=True)
    for pair in pairs:
        check_fast_path(model, pair.name)
    check_target(target_r, Factors(pairs, OwnTensors(lambda: torch.device("cpu"))))
    return name, pairs


def check_target(target_r: Any, factors: Factors) -> float:
    """Return ``target_r``, or half of the adapter's rank if it is None.

    Raises:
        TypeError: ``target_r`` is not a number.
        ValueError: ``target_r`` is not in (0, the adapter's rank], or leaves no rank at all.
    """
    start = factors.layout.cost / max(1, factors.layout.parameters_of_rank_one)
    target = start / 2 if target_r is None else check_positive("target_r", target_r)
    if target > start:
        raise ValueError(
            f"`target_r`={target:g} is greater than the adapter's rank, which is {start:g} on average, and ranks only "
            f"fall. Set `r` in LoraConfig to at least {target:g} (twice `target_r` is usual), or a smaller `target_r`."
        )
    factors.layout.refuse_no_rank(target)
    return target


def _are_pairs(model: Any) -> bool:
    return (
        isinstance(model, Sequence) and len(model) > 0 and all(isinstance(each, FactorPair) for each in model)
    )


class AdaptiveRanks:
    """The handle on a run of adaptive ranks. It reads and controls the ranks. `adapt_ranks` makes it.

    Example:
        >>> import peft, torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"]))
        >>> ranks = rw.adapt_ranks(model, target_r=2, total_step=20)
        >>> ranks
        AdaptiveRanks('default', phase='pruning', step=0, budget=8, target=4)
        >>> ranks.finalize_ranks()
        >>> ranks.is_over, ranks.rank_summary().total_rank <= 4
        (True, True)
    """

    def __init__(
        self,
        pairs: Sequence[FactorPair],
        adapter: str,
        target_r: float | None,
        total_step: int | None,
        tinit: int | float | None,
        tfinal: int | float | None,
        deltaT: int | None,
        model: nn.Module | None = None,
        peft_config: Any = None,
    ) -> None:
        self._model, self._peft_config = model, peft_config
        self._phases = (tinit, tfinal, deltaT)
        self._narrow_when_over = True  # False if a trainer decides when the run is over
        self._in_the_end: tuple[AllocationState, RankSummary] | None = None  # set once the run is over
        self._ended_by: str | None = None  # why the run is over if its layers were not narrowed
        warn = WarnOnce()
        self._tensors = OwnTensors(pairs[0].device)
        factors = Factors(pairs, self._tensors)
        rslora = bool(getattr(peft_config, "use_rslora", False))
        config = AdaLoraConfig(
            init_r=max(factors.layout.block_ranks),
            target_r=check_target(target_r, factors),
            total_step=total_step,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=deltaT,
            use_rslora=rslora,
            lora_alpha=1,  # not used, as each layer has its own scale
        )
        self._choice = PrincipalChoice(factors, config.target_r, rslora, [pair.scale for pair in pairs], warn)
        self._controller = Controller(adapter, factors, self._choice, config, warn)
        self._controller.changed = self._after_step
        self._controller.handle = "ranks"
        # The number of cuts, and whether the choice was final, when the configuration was last written.
        self._written = (0, False)
        self._choice.start()
        self._sync()
        self._lone_values = LoneValues(
            model,
            adapter,
            self._pairs_of_the_run,
            self._waits_for_a_step,
            self._controller.warn,
            self._tell_if_unseen,
        )

    # Reading the ranks.

    def __repr__(self) -> str:
        now = self.allocation_state
        return (
            f"AdaptiveRanks({self.adapter!r}, phase={now.phase!r}, step={now.step}, budget={now.budget}, "
            f"target={now.target})"
        )

    @property
    def adapter(self) -> str:
        """Name of the adapter."""
        return self._controller.adapter

    @property
    def _trains(self) -> bool:
        """Whether any factor of the adapter trains now."""
        return any(each.requires_grad for each in self._controller.factors.all_parameters())

    @property
    def _rankwise_controller(self) -> Controller:
        """The controller of the run. Adapted models have an attribute of the same name, which integrations read."""
        return self._controller

    @property
    def allocation_state(self) -> AllocationState:
        """Step, phase and budget of the run."""
        self._end_if_gone()
        return self._controller.state() if self._in_the_end is None else self._in_the_end[0]

    @property
    def rank_history(self) -> RankHistory:
        """The budget and every layer's rank at each cut."""
        return self._controller.history

    def rank_summary(self) -> RankSummary:
        """Return rank, importance and parameters of every layer. ``print`` shows it as a table.

        If the parameters are sharded over processes, all processes must call it together.
        """
        self._end_if_gone()
        if self._in_the_end is not None:
            return self._in_the_end[1]
        return self._summary(self._controller.layer_importance())

    def _summary(self, importance: Sequence[float]) -> RankSummary:
        layout, ranks = self._controller.factors.layout, self._controller.allocated_ranks()
        rows = [
            LayerRank(name, rank, first, worth, rank * size)
            for (name, rank), first, worth, size in zip(
                ranks.items(), layout.block_ranks, importance, layout.block_costs, strict=True
            )
        ]
        return RankSummary(rows, budget=sum(row.init_r for row in rows))

    def _has_settings(self, settings: Mapping[str, Any]) -> bool:
        """Whether the run was begun with these values of ``target_r``, ``tinit``, ``tfinal`` and ``deltaT``."""
        target = check_target(settings["target_r"], self._controller.factors)
        same_phases = self._phases == tuple(settings[name] for name in ("tinit", "tfinal", "deltaT"))
        return same_phases and target == self._controller.config.target_r

    # Controlling the run.

    def leave_the_end_to(self, trainer: bool = True, handle: str | None = "ranks") -> None:
        """Let a trainer end the run with `end`. Until then checkpoints have the ranks of the start.

        Args:
            trainer: whether a trainer ends the run.
            handle: expression by which the user finds this object, for warnings. None: the user can call nothing.
        """
        self._narrow_when_over = not trainer
        self._controller.handle = handle

    @torch.inference_mode(False)
    def end(self) -> None:
        """End the run: narrow the layers if the budget has reached its target, or warn that it has not."""
        self._lone_values.forget()  # a trainer's best values, which may be the last ones
        controller = self._controller
        controller.warn_if_unfinished()
        if controller.prunes and controller.reached_target:
            controller.fix()
        if controller.fixed:
            self._narrow()

    @property
    def is_over(self) -> bool:
        """Whether no rank changes any more: the layers are narrowed, `detach` was called, or the adapter is deleted."""
        self._end_if_gone()
        return self._in_the_end is not None

    def _end_if_gone(self) -> None:
        """End the run if its adapter was deleted, even if another adapter has the name now."""
        if self._in_the_end is not None:
            return
        try:
            self._controller.factors.all_parameters()
        except FactorsGone:
            self._controller.stop()
            self._lone_values.forget()
            self._tensors.follow(functools.partial(torch.device, "cpu"))
            unknown = [math.nan] * len(self._controller.factors.names)
            self._in_the_end = (self._controller.state(), self._summary(unknown))
            self._ended_by = f"has ended, because the adapter {self.adapter!r} that it began with was deleted"

    def begin_anew(self, total_step: int) -> None:
        """Start the run again, after a trainer has given up an attempt.

        Args:
            total_step: optimizer steps of the new attempt, at least 1.
        """
        self._controller.begin_anew(total_step)

    def set_total_step(self, total_step: int) -> None:
        """Set the number of optimizer steps of the run.

        Args:
            total_step: optimizer steps of the whole run, at least 1.

        Raises:
            ValueError: the phases do not fit into ``total_step``.
        """
        self._controller.set_total_step(total_step)

    def update_and_allocate(self, global_step: int) -> None:
        """Cut ranks for one optimizer step if the schedule does, as scripts for PEFT do. This call is not needed.

        Without such calls ranks are cut at optimizer steps. From the first call on, they are cut only by these calls.
        Place them between ``optimizer.step()`` and ``zero_grad()``.

        Args:
            global_step: optimizer step, from 1.
        """
        if not self.is_over:
            self._controller.update_and_allocate(global_step)

    @torch.inference_mode(False)
    def finalize_ranks(self) -> None:
        """Cut ranks to the final budget now, keep that choice, and narrow the layers to the ranks that are left.

        A run that reaches ``total_step`` in one process does this by itself. Call it if a run ends earlier. If many
        processes train together, call it in all of them, once the model is out of its wrapper. If the parameters are
        sharded over processes (``fully_shard``, ZeRO), the layers are not narrowed. The ranks that are off then stay
        in the factors as zeros, and the outputs are the same.

        Raises:
            ValueError: `detach` was called, or the adapter was deleted.
        """
        if self.is_over and self._ended_by:
            raise ValueError(f"The run {self._ended_by}: begin another one with `adapt_ranks`.")
        self._lone_values.used()
        self._controller.finalize_ranks()
        self._narrow()

    def detach(self) -> None:
        """Stop adapting ranks. The adapter stays as it is, and trains as plain LoRA from here on."""
        if not self.is_over:
            self._in_the_end = (self.allocation_state, self.rank_summary())
            self._ended_by = "was ended by `detach()`"
        self._lone_values.stop()
        self._controller.detach()
        if self._model is not None:
            vars(self._model).get(HANDLES, {}).pop(self.adapter, None)

    # Resuming from a checkpoint.

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as tensors on the CPU by name.

        The model's and the optimizer's own states are not in it. For ``torch.distributed.checkpoint`` pass the handle
        itself: inside it, one entry is text instead of a tensor, because it grows.

        The state of a run that is over is empty, so that the last checkpoint of a loop can be written as the others.
        """
        if self.is_over:
            return {}
        ends = torch.tensor(self._choice.end_scales, dtype=torch.float64, device="cpu")
        run = packed_state(self._controller)
        text = in_sharded_checkpoint()
        return {**self._tensors.state_dict(), "run": as_text(run) if text else run, "end_scales": ends}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the run that a state describes. Load the adapter's factors and the optimizer's state yourself.

        Args:
            state: result of `state_dict`.

        Raises:
            ValueError: the state is damaged or belongs to another run, or either run is over.
        """
        self._refuse_if_over()
        if not state:
            raise ValueError(
                "This is the state of a run that was over, so there is nothing to resume. Its layers may be narrowed: "
                "load its adapter as it was saved, without `adapt_ranks`."
            )
        ends, packed = state.get("end_scales"), state.get("run")
        if ends is None or packed is None or len(ends) != len(self._choice.end_scales):
            raise ValueError(
                "This is not the state of a run on these layers. Pass the result of `state_dict()` of the interrupted "
                "run, on a model with the same LoRA layers and ranks."
            )
        packed = from_text(packed) if isinstance(packed, str) else packed
        before, mine = self._tensors.state_dict(), self._choice.end_scales
        self._tensors.load_state_dict(dict(state))
        try:
            load_packed_state(self._controller, packed)
        except ValueError:
            self._tensors.load_state_dict(before)
            raise
        self._warn_of_scales(mine, ends.tolist())
        self._choice.end_scales = ends.tolist()
        self._lone_values.state_came()
        self._sync()

    def _refuse_if_over(self) -> None:
        if self.is_over:
            why = self._ended_by or "is over and its layers are narrowed"
            raise ValueError(
                f"The run {why}: there is nothing to resume. To go on from an earlier state, load the base model, "
                "attach the adapter anew and call `adapt_ranks`."
            )

    def _pairs_of_the_run(self) -> list[PeftPair]:
        return [] if self.is_over else self._peft_pairs()

    def _tell_if_unseen(self) -> None:
        if not self.is_over and self._lone_values.are_from_here:
            self._controller.warn_if_unseen()

    def _waits_for_a_step(self) -> bool:
        """Whether values may lack the state of their run until the next step.

        Before the first cut, scale and ranks are those of the start. Trainers load the state a little later.
        """
        return len(self.rank_history) < 2 or not self._narrow_when_over

    def _warn_of_scales(self, mine: Sequence[float], ends: Sequence[float]) -> None:
        """Warn if the configuration gives other scales than the loaded run has, now or at its end."""
        now = [pair.scale for pair in self._controller.factors.pairs]  # those of an adapter saved in mid-run
        alike = functools.partial(math.isclose, rel_tol=1e-5)
        if not any(all(map(alike, mine, each)) for each in (ends, now)):
            self._controller.warn(
                f"The run keeps the scale that it began with, {ends[0]:g} in the first layer at the end. "
                f"`lora_alpha` and `r` here give {mine[0]:g}, which is not used."
            )

    # After a cut, and at the end.

    def _after_step(self) -> None:
        controller, schedule = self._controller, self._controller.schedule
        self._lone_values.used()
        now = (len(controller.history), controller.fixed)
        if now != self._written:
            self._written = now
            self._sync()
        over = controller.fixed and schedule is not None and controller.step >= schedule.total_step
        if over and self._narrow_when_over and not many_processes():
            self._narrow()

    def _sync(self) -> None:
        """Write the current scales into PEFT's configuration, so that a saved adapter computes the same."""
        if self._peft_config is not None and not self.is_over:
            write_config(self._peft_config, self._peft_pairs(), ())

    def _peft_pairs(self) -> list[PeftPair]:
        return cast("list[PeftPair]", self._controller.factors.pairs)

    def _narrow(self) -> None:
        if self.is_over or self._model is None or not can_be_narrowed(self._peft_pairs()):
            return
        for pair in self._peft_pairs():
            pair.check_writable()
        factors = self._controller.factors
        in_the_end = (self._controller.state(), self.rank_summary())
        kept = factors.mask.cpu().split(factors.layout.ranks)
        optimizers = self._controller.known_optimizers()
        stay, dropped = narrow(self._model, self._peft_pairs(), kept, optimizers)
        write_config(self._peft_config, stay, dropped, other_paths(self._model, stay))
        self._peft_config.init_lora_weights = (
            True  # PEFT may refuse the ranks that are left with any other start
        )
        if stay:
            self._tensors.follow(stay[0].device)
        self._in_the_end = in_the_end
        self._controller.stop()
        self._lone_values.end(self._model, stay)
