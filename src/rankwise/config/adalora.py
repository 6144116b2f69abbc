"""AdaLoRA's own settings, on top of LoRA's: the first and the last rank, the schedule, the form of the method."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rankwise.config.checks import (
    Default,
    DefaultFraction,
    check_kept_ranks,
    check_number,
    check_positive,
    check_start,
    check_whole,
    default,
)
from rankwise.config.kinds import PeftType
from rankwise.config.lora import PEFT_DEFAULT_R, LoraConfig
from rankwise.method.forms import Form, form_of
from rankwise.method.schedule import BudgetSchedule, check_length, phase_lengths


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """An AdaLoRA adapter: every layer starts at rank ``init_r``, and the average rank ends at ``target_r``.

    Its other fields are those of `LoraConfig`.

    Args:
        init_r: rank of every layer at the start, a whole number of at least 1. None: with "principal" 8, or twice
            ``target_r`` from ``target_r=4`` up; with the paper's form 12.
        target_r: average rank at the end, greater than 0 and at most ``init_r``. Below 1, such as 0.25, some layers
            end at rank 0. If it equals ``init_r``, no rank is cut.
        tinit: length of the warm-up, in which no rank is cut, in optimizer steps (int) or as a fraction of the run
            (float in [0, 1)). None: 2 % of the run with "principal", 0 with the paper's form.
        tfinal: length of the final phase, in which no rank changes, in optimizer steps (int) or as a fraction of the
            run (float in [0, 1)). None: 60 % of the run with "principal", 0 with the paper's form.
        deltaT: optimizer steps between two cuts, at least 1. None: with "principal" the number that gives twenty cuts,
            with the paper's form 1.
        beta1: decay of the running sensitivity, in (0, 1). Only the paper's form uses it.
        beta2: decay of the running uncertainty, in (0, 1). Only the paper's form uses it.
        orth_reg_weight: weight of the orthogonality penalty, at least 0. None: 0 with "principal", 0.5 with the
            paper's form.
        total_step: optimizer steps of the whole run. None: the trainer or ``model.set_total_step`` sets it.
        lora_alpha: numerator of the scale, greater than 0. With "principal" the scale is ``lora_alpha / k``, where
            ``k`` is the current average rank. With the paper's form it is ``lora_alpha / init_r`` throughout. None:
            with "principal" ``2 * target_r * (target_r / 2) ** (1 / 4)``, rounded, or ``2 * target_r`` if ``target_r``
            is at most 2, no rank is cut or ``use_rslora`` is set; with the paper's form 8.
        use_rslora: scale by ``lora_alpha / sqrt(k)`` instead. Only "principal" has this setting.
        init_lora_weights: form of the method and start of the factors: "principal", True, "gaussian" or False. The
            text below describes them.
        rank_pattern: the result of a run. It maps each ``"<module path>.lora_E"`` to a list of ``init_r`` booleans,
            True for the ranks that stay. A stack of matrices has ``init_r`` booleans per matrix, in order.
        r: not used by AdaLoRA. For compatibility, a rank of at least 1 is accepted with a warning.

    The class has two forms of the method. ``init_lora_weights="principal"`` is the default. It starts and learns as
    LoRA does: A is random and B is 0, and LoRA's learning rates fit. Before each cut it writes every layer's update in
    its principal directions. It then cuts, over all layers, the directions that are worth least for their parameters.
    The budget counts parameters: at the end the adapter has at most as many as LoRA of rank ``target_r``.

    ``init_lora_weights=True`` (PEFT's value) is the paper's form, with the same numbers as PEFT: E starts at 0, A and
    B start normal, all three train, every triplet is scored, and the budget counts ranks. It needs a much larger
    learning rate. "gaussian" means the same as True. False starts from a random update, for tests.

    Raises:
        TypeError: a field is unknown, or a value has the wrong type.
        ValueError: a value is out of range, two values contradict each other, or the schedule leaves no step for
            pruning.

    Example:
        >>> config = AdaLoraConfig(init_r=16, target_r=4, target_modules=["q_proj"])
        >>> config.with_total_step(3000).resolved_schedule()
        BudgetSchedule(tinit=60, tfinal=1800, total_step=3000, deltaT=57)
        >>> AdaLoraConfig(delta_t=10)
        Traceback (most recent call last):
        ...
        TypeError: AdaLoraConfig has no field `delta_t`. Did you mean `deltaT`?
    """

    peft_type: ClassVar[PeftType] = PeftType.ADALORA

    r: int = field(default=Default(PEFT_DEFAULT_R), repr=False)
    init_r: int = None  # type: ignore[assignment]  # the check replaces None by a number; so for those below
    target_r: float = 8
    tinit: int | float | None = None
    tfinal: int | float | None = None
    deltaT: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    lora_alpha: float = None  # type: ignore[assignment]
    orth_reg_weight: float = None  # type: ignore[assignment]
    total_step: int | None = None
    init_lora_weights: bool | Literal["gaussian", "principal"] = "principal"  # type: ignore[assignment]
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    @property
    def form(self) -> Form:
        """The form of the method that ``init_lora_weights`` asks for."""
        return form_of(self.init_lora_weights)

    def resolved_schedule(self) -> BudgetSchedule:
        """Return the schedule in whole optimizer steps.

        Raises:
            ValueError: ``total_step`` is not known yet, or the phases overlap.

        Example:
            >>> AdaLoraConfig(target_r=4, tinit=0.1, tfinal=0.5, deltaT=10, total_step=200).resolved_schedule()
            BudgetSchedule(tinit=20, tfinal=100, total_step=200, deltaT=10)
        """
        if self.total_step is None:
            raise ValueError(
                "The schedule needs the number of optimizer steps: pass `total_step` to AdaLoraConfig, or "
                "call `model.set_total_step(n)` before training."
            )
        total, form = self.total_step, self.form
        given_tinit = None if _left_out(self.tinit) else self.tinit
        given_tfinal = None if _left_out(self.tfinal) else self.tfinal
        tinit, tfinal = phase_lengths(given_tinit, given_tfinal, total, (form.tinit, form.tfinal))
        deltaT = form.deltaT(total - tinit - tfinal) if _left_out(self.deltaT) else self.deltaT
        return BudgetSchedule(tinit, tfinal, total, deltaT)  # type: ignore[arg-type]

    def with_total_step(self, total_step: int) -> AdaLoraConfig:
        """Return a checked copy for a run of ``total_step`` optimizer steps. Fractions stay fractions.

        Args:
            total_step: optimizer steps of the whole run, at least 1.

        Raises:
            TypeError: ``total_step`` is not a whole number.
            ValueError: the schedule leaves no step for pruning.
        """
        return dataclasses.replace(self, total_step=total_step)

    def _check(self) -> None:
        left_out = _left_out(self.__dict__["lora_alpha"])
        if left_out:
            self.__dict__["lora_alpha"] = self._default_alpha()
        super()._check()
        if left_out:
            self.__dict__["lora_alpha"] = default(self.lora_alpha)  # a default follows other fields
        self._check_schedule()
        for name in ("beta1", "beta2"):
            value = self.__dict__[name] = check_number(name, self.__dict__[name])
            if not 0 < value < 1:
                raise ValueError(f"`{name}` must be between 0 and 1, both excluded, but is {value}.")
        if self.__dict__["orth_reg_weight"] is None:
            self.__dict__["orth_reg_weight"] = self.form.orth_reg_weight
        weight = self.__dict__["orth_reg_weight"] = check_number("orth_reg_weight", self.orth_reg_weight)
        if weight < 0:
            raise ValueError(f"`orth_reg_weight` must be at least 0, but is {weight}.")
        if self.use_rslora and not self.form.takes_rslora:
            raise ValueError(
                "`use_rslora` does not work with the paper's form of AdaLoRA, whose scale is lora_alpha / init_r. "
                "For a larger scale, increase `lora_alpha`; or leave `init_lora_weights` at 'principal'."
            )
        if self.alpha_pattern:
            raise ValueError("`alpha_pattern` belongs to LoraConfig: AdaLoRA has one `lora_alpha` for all.")

    def _default_alpha(self) -> float:
        target_r = check_positive("target_r", self.target_r)
        cuts = _left_out(self.init_r) or self.init_r != target_r
        form = form_of(self._checked_start(self.init_lora_weights))
        return form.lora_alpha(target_r, bool(self.use_rslora), cuts)

    @staticmethod
    def _checked_start(value: Any) -> bool | str:
        if value == "principal":
            return "principal"
        return check_start(
            value,
            "'principal' (LoRA's start, cut in principal directions), True (the paper's form) or False (random)",
        )

    def _check_rank(self) -> None:
        values = self.__dict__
        values["target_r"] = check_positive("target_r", self.target_r)
        if _left_out(self.init_r):
            form = form_of(self._checked_start(self.init_lora_weights))
            values["init_r"] = Default(form.init_r(self.target_r))  # a default follows other fields
        else:
            values["init_r"] = check_whole("init_r", self.init_r, least=1)
        if self.target_r > self.init_r and not self.inference_mode:
            raise ValueError(
                f"`target_r`={self.target_r} is greater than `init_r`={self.init_r}, but ranks only fall: "
                f"set init_r to at least {math.ceil(self.target_r)} or leave it out."
            )
        values["rank_pattern"] = check_kept_ranks(
            self.rank_pattern, self.init_r, bool(self.target_parameters)
        )
        if not isinstance(self.r, Default):
            r = check_whole("r", self.r, least=1)
            values["r"] = Default(PEFT_DEFAULT_R)
            warnings.warn(
                f"`r={r}` has no effect in AdaLoraConfig, where ranks start at init_r={self.init_r} and end "
                f"at target_r={self.target_r} on average. For an average rank of {r}, set target_r={r} and "
                f"init_r={2 * r}, and leave `r` out.",
                UserWarning,
                stacklevel=7,
            )

    def _check_schedule(self) -> None:
        values = self.__dict__
        for name in ("tinit", "tfinal"):
            if not _left_out(values[name]):
                values[name] = check_number(name, values[name])
        if not _left_out(self.deltaT):
            values["deltaT"] = check_whole("deltaT", self.deltaT, least=None if self.inference_mode else 1)
        if self.total_step is not None:
            values["total_step"] = check_whole("total_step", self.total_step, least=None)
        if self.inference_mode:
            with contextlib.suppress(ValueError):  # nothing will be trained: the schedule may be anything
                self._fill_in_phases()
        else:
            self._check_phases()

    def _fill_in_phases(self) -> None:
        schedule = self.resolved_schedule()
        for name in ("tinit", "tfinal", "deltaT"):
            if _left_out(self.__dict__[name]):
                # Still a default, which follows the other fields.
                self.__dict__[name] = Default(getattr(schedule, name))

    def _check_phases(self) -> None:
        for name in ("tinit", "tfinal"):
            if not _left_out(self.__dict__[name]):
                check_length(name, self.__dict__[name])
        if self.total_step is not None:
            self._fill_in_phases()
        elif self._in_fractions() and self.tinit + self.tfinal >= 1:  # type: ignore[operator]
            raise ValueError(
                f"The schedule leaves no step for pruning: tinit={self.tinit} and tfinal={self.tfinal} are "
                "fractions of the run, and must be less than 1 together."
            )

    def _in_fractions(self) -> bool:
        return isinstance(self.tinit, float) and isinstance(self.tfinal, float)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration under PEFT's names, ready for JSON. Fractions become steps once they are known.

        PEFT reads an AdaLoRA configuration only if ``total_step`` is set.
        """
        data = super().to_dict()
        data["r"] = PEFT_DEFAULT_R
        if self.total_step is not None:
            with contextlib.suppress(ValueError):  # in inference mode the schedule may be anything
                schedule = self.resolved_schedule()
                data.update(tinit=schedule.tinit, tfinal=schedule.tfinal, deltaT=schedule.deltaT)
        return data

    @classmethod
    def _from_file(cls, values: dict[str, Any], extra: dict[str, Any]) -> None:
        """Handle fields that PEFT's AdaLoRA ignores: the kind of start, `r`, `use_rslora` and `alpha_pattern`."""
        start = values.setdefault("init_lora_weights", True)  # PEFT's default
        if start == "gated":  # an earlier default: its factors and its scale in the file fit "principal"
            values["init_lora_weights"] = start = "principal"
        elif isinstance(start, str) and start not in ("gaussian", "principal"):
            extra["init_lora_weights"] = start
            values["init_lora_weights"] = True
        if values.get("r", PEFT_DEFAULT_R) == PEFT_DEFAULT_R:
            values.pop("r", None)
        for name in ("use_rslora", "alpha_pattern"):
            if values.get(name) and not (name == "use_rslora" and start == "principal"):
                warnings.warn(
                    f"`{name}` in the file has no effect on an AdaLoRA adapter, in PEFT as here: left out.",
                    UserWarning,
                    stacklevel=3,
                )
                del values[name]


def _left_out(value: Any) -> bool:
    return value is None or isinstance(value, (Default, DefaultFraction))
