"""`adapt_ranks`: adaptive ranks on anybody's LoRA layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

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
from rankwise.config import AdaLoraConfig
from rankwise.config.checks import check_positive
from rankwise.parallel.processes import many_processes
from rankwise.run.checkpoint import load_packed_state, packed_state
from rankwise.run.choice.principal import PrincipalChoice
from rankwise.run.controller import Controller
from rankwise.run.factors import Factors
from rankwise.run.history import RankHistory
from rankwise.run.pairs import FactorPair
from rankwise.run.run_tensors import OwnTensors
from rankwise.run.state import AllocationState
from rankwise.run.summary import LayerRank, RankSummary
from rankwise.run.warn_once import WarnOnce

HANDLES = "_rankwise_adaptive_ranks"  # the attribute of a model that keeps its handles, by adapter


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
    """Let the ranks of a LoRA adapter adapt while it trains: a fixed budget moves to the layers that use it.

    The adapter is PEFT's own, and so are its layers: nothing of them is replaced. The rank in its ``LoraConfig`` is the
    rank to start from. From here on ranks adapt whenever an optimizer that holds the adapter's factors steps, in any
    training loop. When the run ends, the layers are narrowed to the ranks that are left, and the result is an ordinary
    LoRA adapter.

    The scale that you chose (``lora_alpha / r``) is the one the run ends with. While more ranks act it is smaller in
    proportion, so that the adapter learns at an even pace.

    Args:
        model: a model with a LoRA adapter of PEFT: what ``peft.get_peft_model`` returns, or a model in which adapters
            were injected, as by Transformers' ``add_adapter``. Or a list of `FactorPair`, one for each LoRA layer of
            another library or of your own; then keep the handle, since nothing else does.
        target_r: average rank in the end, greater than 0 and at most the rank of the adapter; below 1, some layers end
            without any. None: half of the adapter's rank.
        total_step: optimizer steps of the whole run. None: say it later with `AdaptiveRanks.set_total_step`, before the
            first step.
        adapter: the adapter's name. None: the one that is active.
        tinit: warm-up, in steps (int) or as a fraction of the run (float in [0, 1)). None: 2 % of the run.
        tfinal: last phase, in which no rank changes, in steps or as a fraction. None: three fifths of the run.
        deltaT: steps between two cuts, at least 1. None: chosen to give twenty cuts.

    Returns:
        A handle. The model keeps it as long as it exists.

    Raises:
        TypeError: ``model`` is neither, or a number is of a wrong type.
        ValueError: the model has no LoRA adapter of PEFT, or one whose meaning would change when ranks are cut (PiSSA,
            OLoRA and LoftQ starts, ``lora_bias``, shared factors, variants other than DoRA); the factors of a
            `FactorPair` make up no product ``B A``; ``target_r`` is above its rank; or the schedule has no step for
            pruning. The model is then as before.

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
        if name in vars(whole).get(HANDLES, {}):
            raise ValueError(
                f"The ranks of adapter {name!r} adapt already. Call `detach()` on the first handle to begin anew."
            )
        # A copy, as the caller may use the configuration again, and TRL's copy of an adapter shares it.
        peft_config = copy.deepcopy(whole.peft_config[name])
        handle = AdaptiveRanks(pairs, name, target_r, total_step, tinit, tfinal, deltaT, whole, peft_config)
        whole.peft_config[name] = peft_config
        vars(whole).setdefault(HANDLES, {})[name] = handle
        return handle
    own = cast("Sequence[FactorPair]", model)
    check_pairs(own)
    return AdaptiveRanks(own, adapter or "default", target_r, total_step, tinit, tfinal, deltaT)


def check_adaptable(model: Any, adapter: str | None, target_r: float | None) -> tuple[str, list[PeftPair]]:
    """See that the ranks of an adapter in ``model`` can be adapted; its name, and its layers' factors.

    Raises:
        TypeError, ValueError: as `adapt_ranks`.
    """
    check_model(model)
    name = chosen_adapter(model, adapter)
    pairs = peft_pairs(model, name)
    check_adapter(model.peft_config[name], name, pairs)
    check_target(target_r, Factors(pairs, OwnTensors(lambda: torch.device("cpu"))))
    return name, pairs


def check_target(target_r: Any, factors: Factors) -> float:
    """``target_r``, or half of the adapter's rank where it is None.

    Raises:
        TypeError: it is no number.
        ValueError: it is not in (0, the adapter's rank], or leaves no rank at all.
    """
    start = factors.layout.cost / max(1, factors.layout.parameters_of_rank_one)
    target = start / 2 if target_r is None else check_positive("target_r", target_r)
    if target > start:
        raise ValueError(
            f"`target_r`={target:g} is greater than the adapter's rank, which is {start:g} on average, and ranks only "
            f"fall. Set `r` in LoraConfig to at least {target:g} (twice `target_r` is usual), or a smaller `target_r`."
        )
    blocks = len(factors.layout.block_ranks)
    if round(target * blocks) < 1:
        raise ValueError(
            f"`target_r`={target:g} leaves no rank at all for {blocks} layers: set it to at least {1 / blocks:.3g}."
        )
    return target


def _are_pairs(model: Any) -> bool:
    return (
        isinstance(model, Sequence) and len(model) > 0 and all(isinstance(each, FactorPair) for each in model)
    )


class AdaptiveRanks:
    """The handle of a run: where its ranks are, and steering them. `adapt_ranks` makes it."""

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
        self._narrow_when_over = True  # a trainer decides itself when the run is over
        self._in_the_end: tuple[AllocationState, RankSummary] | None = None  # once the layers are narrowed
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
            lora_alpha=1,  # each layer has a scale of its own
        )
        self._choice = PrincipalChoice(factors, config.target_r, rslora, [pair.scale for pair in pairs], warn)
        self._controller = Controller(adapter, factors, self._choice, config, warn)
        self._controller.changed = self._after_step
        self._controller.finished_by = "ranks.finalize_ranks()"
        # Cuts so far, and whether the choice was final, when the configuration was written last.
        self._written = (0, False)
        self._choice.start()
        self._sync()

    # Where the ranks are.

    @property
    def adapter(self) -> str:
        """The adapter's name."""
        return self._controller.adapter

    @property
    def _rankwise_controller(self) -> Controller:
        """As adapted models of rankwise have it, for integrations."""
        return self._controller

    @property
    def allocation_state(self) -> AllocationState:
        """Step, phase and budget of the run."""
        return self._controller.state() if self._in_the_end is None else self._in_the_end[0]

    @property
    def rank_history(self) -> RankHistory:
        """The budget and every layer's rank at each cut."""
        return self._controller.history

    def rank_summary(self) -> RankSummary:
        """Rank, importance and parameters of every layer. ``print`` shows it as a table.

        Where processes share out the parameters, all of them must call it together.
        """
        if self._in_the_end is not None:
            return self._in_the_end[1]
        layout, ranks = self._controller.factors.layout, self._controller.allocated_ranks()
        importance = self._controller.layer_importance()
        rows = [
            LayerRank(name, rank, first, worth, rank * size)
            for (name, rank), first, worth, size in zip(
                ranks.items(), layout.block_ranks, importance, layout.block_costs, strict=True
            )
        ]
        return RankSummary(rows, budget=sum(row.init_r for row in rows))

    # Steering them.

    def leave_the_end_to(self, trainer: bool = True, handle: str = "ranks") -> None:
        """Let a trainer say when the run is over, by `end`: until then checkpoints have the ranks of the start.

        Args:
            trainer: whether it does.
            handle: where the user finds this object, for warnings.
        """
        self._narrow_when_over = not trainer
        self._controller.finished_by = f"{handle}.finalize_ranks()"

    @torch.inference_mode(False)
    def end(self) -> None:
        """The trainer is done: narrow the layers if the choice of ranks is final, or else warn that it is not."""
        self._controller.warn_if_unfinished()
        if self._controller.fixed:
            self._narrow()

    @property
    def is_over(self) -> bool:
        """Whether the layers are narrowed, so that nothing adapts any more."""
        return self._in_the_end is not None

    def begin_anew(self, total_step: int) -> None:
        """A trainer has given up an attempt and starts again, with ``total_step`` steps."""
        self._controller.begin_anew(total_step)

    def set_total_step(self, total_step: int) -> None:
        """Say how many optimizer steps the run has.

        Raises:
            ValueError: the phases do not fit into so many steps.
        """
        self._controller.set_total_step(total_step)

    def update_and_allocate(self, global_step: int) -> None:
        """Cut, where the schedule does, for optimizer step ``global_step`` (from 1), as PEFT's scripts do.

        Not needed: it happens by itself. From the first call on, it happens only at these calls, which belong between
        ``optimizer.step()`` and ``zero_grad()``.
        """
        self._controller.update_and_allocate(global_step)

    @torch.inference_mode(False)
    def finalize_ranks(self) -> None:
        """Bring the budget to its target now, keep that choice, and narrow the layers to the ranks that are left.

        A run that reaches ``total_step`` in one process does so by itself. Call it when a run ends before, and when
        many processes train together: then in all of them, once nothing wraps the model any more. Where processes share
        out the parameters (``fully_shard``, ZeRO), layers keep the ranks that are off as zeros, which compute the same.
        """
        self._controller.finalize_ranks()
        self._narrow()

    def detach(self) -> None:
        """Stop adapting: the adapter stays as it is, and trains on as plain LoRA."""
        self._controller.detach()
        if self._model is not None:
            vars(self._model).get(HANDLES, {}).pop(self.adapter, None)

    # Going on from a checkpoint.

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs, beside the model's and the optimizer's own state: tensors on the CPU, by name."""
        if self.is_over:
            raise ValueError("The run is over and its layers are narrowed: there is nothing to resume.")
        ends = torch.tensor(self._choice.end_scales, dtype=torch.float64)
        return {**self._tensors.state_dict(), "run": packed_state(self._controller), "end_scales": ends}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave; load the adapter's factors and the optimizer's state yourself.

        Raises:
            ValueError: it is damaged, or of another run.
        """
        ends, packed = state.get("end_scales"), state.get("run")
        if ends is None or packed is None or len(ends) != len(self._choice.end_scales):
            raise ValueError(
                "This is not the state of a run on these layers. Pass what `state_dict()` of the interrupted run gave, "
                "on a model with the same LoRA layers and ranks."
            )
        before = self._tensors.state_dict()
        self._tensors.load_state_dict(dict(state))
        try:
            load_packed_state(self._controller, packed)
        except ValueError:
            self._tensors.load_state_dict(before)
            raise
        self._choice.end_scales = ends.tolist()
        self._sync()

    # What follows a cut, and the end.

    def _after_step(self) -> None:
        controller, schedule = self._controller, self._controller.schedule
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
            True  # others than the plain start may not take the ranks that are left
        )
        if stay:
            self._tensors.follow(stay[0].device)
        self._in_the_end = in_the_end
        self._controller.stop()
