"""Packs, checks and restores the part of a run that is not in its tensors.

The run's tensors hold the kept ranks and the statistics of gradients (see `rankwise.run.run_tensors`). The rest is a
`RunState`, which a checkpoint stores as one tensor.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from rankwise.run.controller import Controller
from rankwise.run.optimizers import Optimizers
from rankwise.run.state import RunState, RunWeights


def run_state(controller: Controller) -> RunState:
    """Everything about the run that is not in its tensors."""
    return RunState(
        step=controller.step,
        fixed=controller.fixed,
        automatic=controller.automatic,
        leader=controller.optimizers.leader,
        schedule=controller.schedule,
        target_r=controller.config.target_r,
        form=controller.config.form.name,
        weights=RunWeights.of(controller.config),
        scales=tuple(pair.scale for pair in controller.factors.pairs),
        history=controller.history,
    )


def packed_state(controller: Controller) -> Tensor:
    """Pack `run_state` into one int64 vector, for the model's extra state."""
    return run_state(controller).to_tensor()


def as_text(packed: Tensor) -> str:
    """The result of `packed_state` as text. A history grows, and a sharded checkpoint loads tensors of one size."""
    return json.dumps(packed.tolist())


def from_text(text: str) -> Tensor:
    """Read the result of `as_text`.

    Raises:
        ValueError: ``text`` is something else.
    """
    try:
        return torch.tensor(json.loads(text), dtype=torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{text[:80]!r} is not the state of a run ({error}).") from None


def check_packed_state(controller: Controller, packed: Tensor) -> RunState:
    """Unpack the result of `packed_state`, and check that it belongs to this run.

    Raises:
        ValueError: the state is damaged, or the run it belongs to has other layers, another schedule, target or scale.
    """
    state = RunState.from_tensor(controller.factors.names, packed)
    schedule = controller.schedule
    if schedule is None and state.schedule is not None:
        schedule = controller.config.with_total_step(state.schedule.total_step).resolved_schedule()
    state.check_same_run(run_state(controller), schedule if controller.prunes else None)
    return state


def load_packed_state(controller: Controller, packed: Tensor) -> None:
    """Continue from the result of `packed_state`. The run's tensors must have been loaded before.

    Raises:
        ValueError: as in `check_packed_state`.
    """
    state = check_packed_state(controller, packed)
    for name, was in vars(state.weights).items():
        value = getattr(controller.config, name)
        if value != was:
            controller.warn(f"The run goes on with `{name}`={value}; so far it had {was}.")
    if state.schedule is not None and controller.schedule is None:
        controller.set_total_step(state.schedule.total_step)
    controller.step, controller.automatic, controller.history = state.step, state.automatic, state.history
    controller.optimizers = Optimizers(controller.factors, controller.warn, state.leader)
    controller.choice.restore(state.scales)
    controller.fixed = False
    controller.factors.widen()
    if state.fixed:
        controller.fix()
