"""The budget schedule: it maps an optimizer step to the phase of the run and the budget of ranks.

AdaLoRA (Zhang et al., 2023, https://arxiv.org/abs/2303.10512, section 3.3) trains in three phases:

- *warm-up*, steps 1 to ``tinit``: every rank trains and none is cut;
- *pruning*, up to step ``total_step - tfinal``: the budget falls along a cubic curve, and every ``deltaT`` steps the
  ranks with the lowest scores are cut;
- *final*, the last ``tfinal`` steps: the choice of ranks is fixed, and the ranks that are left are fine-tuned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Phase(str, Enum):
    """The three phases of a run. Each is also a plain string, for logs.

    Example:
        >>> Phase.PRUNING == "pruning", f"{Phase.WARMUP}"
        (True, 'warm-up')
    """

    WARMUP = "warm-up"
    PRUNING = "pruning"
    FINAL = "final"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class BudgetSchedule:
    """A budget schedule in whole optimizer steps, counted from 1.

    Args:
        tinit: optimizer steps of warm-up, at least 0.
        tfinal: optimizer steps of the final phase, at least 0.
        total_step: optimizer steps of the whole run, with ``tinit < total_step - tfinal``.
        deltaT: optimizer steps between two cuts in the pruning phase, at least 1.

    Raises:
        TypeError: a value is not a whole number.
        ValueError: a value is out of range, or the phases overlap.

    Example:
        >>> schedule = BudgetSchedule(tinit=200, tfinal=500, total_step=3000, deltaT=10)
        >>> str(schedule.phase(200)), str(schedule.phase(201)), str(schedule.phase(2501))
        ('warm-up', 'pruning', 'final')
        >>> [schedule.budget(step, initial=144, target=96) for step in (200, 1000, 2500)]
        [144, 109, 96]
        >>> schedule.allocates(1005), schedule.allocates(1010), schedule.allocates(2500)
        (False, True, True)
    """

    tinit: int
    tfinal: int
    total_step: int
    deltaT: int = 1

    def __post_init__(self) -> None:
        for name, least in (("tinit", 0), ("tfinal", 0), ("total_step", 1), ("deltaT", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be a whole number of steps, but is {value!r}.")
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, but is {value}.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(_overlap_message(self.tinit, self.tfinal, self.total_step))

    @classmethod
    def resolve(
        cls, tinit: int | float, tfinal: int | float, total_step: int, deltaT: int = 1
    ) -> BudgetSchedule:
        """Make a schedule from steps (int) or fractions of the run (float in [0, 1)).

        A fraction is rounded to the nearest whole step, or down if no step would be left for pruning.

        Args:
            tinit: length of the warm-up, in optimizer steps (int) or as a fraction of the run (float in [0, 1)).
            tfinal: length of the final phase, in optimizer steps (int) or as a fraction of the run (float in [0, 1)).
            total_step: optimizer steps of the whole run, at least 1.
            deltaT: optimizer steps between two cuts, at least 1.

        Raises:
            TypeError: a value is not a number of the right type.
            ValueError: a value or a fraction is out of range, or the phases overlap.

        Example:
            >>> BudgetSchedule.resolve(tinit=0.1, tfinal=0.3, total_step=1000)
            BudgetSchedule(tinit=100, tfinal=300, total_step=1000, deltaT=1)
        """
        return cls(*phase_lengths(tinit, tfinal, total_step), total_step, deltaT)

    @property
    def last_allocation(self) -> int:
        """The step after which no rank changes any more: ``total_step - tfinal``."""
        return self.total_step - self.tfinal

    def phase(self, step: int) -> Phase:
        """The phase of an optimizer step.

        Args:
            step: optimizer step, from 1.
        """
        if step <= self.tinit:
            return Phase.WARMUP
        return Phase.PRUNING if step <= self.last_allocation else Phase.FINAL

    def phases(self) -> dict[Phase, tuple[int, int]]:
        """The phases that have at least one step, each with its first and its last step.

        Example:
            >>> phases = BudgetSchedule(tinit=0, tfinal=3, total_step=10).phases()
            >>> {str(phase): steps for phase, steps in phases.items()}
            {'pruning': (1, 7), 'final': (8, 10)}
        """
        ends = (0, self.tinit, self.last_allocation, self.total_step)
        return {phase: (ends[n] + 1, ends[n + 1]) for n, phase in enumerate(Phase) if ends[n] < ends[n + 1]}

    def budget(self, step: int, initial: int, target: int) -> int:
        """The number of ranks that may stay after an optimizer step.

        In the pruning phase it is
        ``int(target + (initial - target) * (1 - (step - tinit) / (total_step - tfinal - tinit)) ** 3)``. Before that
        phase it is ``initial``, and after it ``target`` (Zhang et al., 2023, equation 13).

        Args:
            step: optimizer step, from 1.
            initial: sum of all initial ranks, at least ``target``.
            target: sum of all ranks at the end of the run, at least 0.
        """
        if step <= self.tinit:
            return initial
        if step >= self.last_allocation:
            return target
        left = 1 - (step - self.tinit) / (self.last_allocation - self.tinit)
        return int(target + (initial - target) * left**3)

    def allocates(self, step: int) -> bool:
        """Whether ranks are cut after an optimizer step.

        Args:
            step: optimizer step, from 1.
        """
        if step == self.last_allocation:
            return True
        return self.phase(step) is Phase.PRUNING and step % self.deltaT == 0


def check_length(name: str, value: int | float) -> None:
    """Check a phase length given in steps (int, at least 0) or as a fraction of the run (float in [0, 1)).

    Raises:
        TypeError: the length is not a number.
        ValueError: the length is out of range or not finite.

    Example:
        >>> check_length("tinit", 0.1)
        >>> check_length("tinit", 1.5)
        Traceback (most recent call last):
        ...
        ValueError: `tinit` given as a fraction of the run must be in [0, 1), but is 1.5. For steps, pass an int.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"`{name}` must be an int (steps) or a float (fraction of the run), but is {value!r}."
        )
    if isinstance(value, int) and value < 0:
        raise ValueError(f"`{name}` must be at least 0, but is {value}.")
    if isinstance(value, float) and not (math.isfinite(value) and 0 <= value < 1):
        raise ValueError(
            f"`{name}` given as a fraction of the run must be in [0, 1), but is {value}. For steps, pass an int."
        )


def whole_steps(value: int | float, total_step: int, name: str = "length") -> int:
    """A phase's length in steps, from steps (int) or a fraction of ``total_step`` (float in [0, 1)).

    Raises:
        TypeError: as `check_length`.
        ValueError: as `check_length`.

    Example:
        >>> whole_steps(0.1, total_step=1000), whole_steps(30, total_step=1000)
        (100, 30)
    """
    check_length(name, value)
    return round(value * total_step) if isinstance(value, float) else value


def phase_lengths(
    tinit: int | float | None,
    tfinal: int | float | None,
    total_step: int,
    shares: tuple[float, float] = (0.0, 0.0),
) -> tuple[int, int]:
    """The lengths of warm-up and final phase in steps. At least one step is left for pruning if the input allows it.

    A length of None takes its share of what the other length leaves. In a short run, rounding fractions up may fill the
    whole run. One phase is then made a step shorter: a phase given as None, or else the longer one.

    Args:
        tinit: length of the warm-up, in steps (int) or as a fraction of the run (float in [0, 1)). None: its share.
        tfinal: length of the final phase, in steps (int) or as a fraction (float in [0, 1)). None: its share.
        total_step: optimizer steps of the run, at least 1.
        shares: shares of warm-up and final phase for lengths of None, each in [0, 1), together less than 1.

    Raises:
        TypeError: as `check_length`.
        ValueError: as `check_length`.

    Example:
        >>> phase_lengths(None, None, 1000, shares=(0.02, 0.6)), phase_lengths(None, None, 1, shares=(0.02, 0.6))
        ((20, 600), (0, 0))
        >>> phase_lengths(500, None, 1000, shares=(0.02, 0.6)), phase_lengths(0.5, 0.4, 2)
        ((500, 300), (1, 0))
    """
    warmup = None if tinit is None else whole_steps(tinit, total_step, "tinit")
    final = None if tfinal is None else whole_steps(tfinal, total_step, "tfinal")
    if final is None:
        final = round(shares[1] * max(total_step - (warmup or 0), 0))
    if warmup is None:
        warmup = round(shares[0] * (total_step if tfinal is None else max(total_step - final, 0)))
    if not 0 < total_step <= warmup + final or _share(tinit, total_step) + _share(tfinal, total_step) >= 1:
        return warmup, final
    # Here only rounding has taken the last step.
    if _gives_way(tfinal, final) >= _gives_way(tinit, warmup):
        return warmup, final - 1
    return warmup - 1, final


def _gives_way(length: int | float | None, steps: int) -> tuple[bool, bool, int]:
    """A sorting key for the phase to shorten: a phase given as None, else one given as a fraction, else the longer."""
    return steps > 0 and not isinstance(length, int), length is None, steps


def _share(length: int | float | None, total_step: int) -> float:
    """The share of the run that a length asks for, without rounding."""
    if length is None or isinstance(length, float):
        return length or 0.0
    return length / max(total_step, 1)


def _overlap_message(tinit: int, tfinal: int, total_step: int) -> str:
    message = (
        f"The schedule leaves no step for pruning: tinit={tinit} must be less than total_step - tfinal = "
        f"{total_step} - {tfinal} = {total_step - tfinal}."
    )
    nearest = nearest_schedule(tinit, tfinal, total_step)
    if nearest is None:
        return f"{message} A run needs at least 1 step for pruning: increase total_step."
    return f"{message} Nearest that works: tinit={nearest[0]}, tfinal={nearest[1]}, total_step={total_step}."


def nearest_schedule(tinit: int, tfinal: int, total_step: int) -> tuple[int, int] | None:
    """Lengths of warm-up and final phase that leave a third of the run for pruning and keep the given proportion.

    The result is None if ``total_step`` is too short for any schedule.

    Example:
        >>> nearest_schedule(6000, 11000, 13500)
        (3176, 5823)
    """
    if total_step < 1:
        return None
    free = total_step - max(1, total_step // 3)
    asked = tinit + tfinal
    return tinit * free // asked, tfinal * free // asked
