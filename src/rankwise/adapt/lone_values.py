"""Notices values that are loaded into an adapter whose ranks adapt, without the state of the run that made them.

The scale and the ranks change in a run, and belong to that state. Once the run is over, values with other ranks are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from rankwise.adapt.peft_pairs import PeftPair
from rankwise.run.pairs import FactorsGone


class LoneValues:
    """Warns when values are used without the state of their run.

    They are used by the next step, forward pass, save or call of `finalize_ranks`. Until then, scripts, trainers and
    `Accelerator.load_state` can load the state. They may also load it first.

    Args:
        model: the PEFT model with the adapter. None: other layers, of which nothing is noticed.
        adapter: the adapter's name.
        pairs: a function that gives the adapter's factors, or nothing if its run is over.
        waits_for_a_step: a function that says whether saves do not count as use now.
        warn: a function that gives each warning once.
        before_save: a function that is called before each save.
    """

    def __init__(
        self,
        model: nn.Module | None,
        adapter: str,
        pairs: Callable[[], Sequence[PeftPair]],
        waits_for_a_step: Callable[[], bool],
        warn: Callable[[str], None],
        before_save: Callable[[], None],
    ) -> None:
        self._before_save = before_save
        self._adapter, self._pairs = adapter, pairs
        self._waits_for_a_step, self._warn = waits_for_a_step, warn
        # What was loaded since the last step: "values" if it was only factors, "state" if it was the state of a run.
        self._loaded: str | None = None
        self._forward_hook: RemovableHandle | None = None  # set while it is "values"
        self._hooks: list[RemovableHandle] = []
        self._narrowed: Sequence[PeftPair] = ()  # the layers, once the run is over
        if model is not None:
            self._hooks.append(model.register_load_state_dict_pre_hook(self._values_come))
            self._hooks.append(model.register_state_dict_pre_hook(self._values_go))

    def _values_come(self, model: nn.Module, state: Mapping[str, Any], prefix: str, *unused: Any) -> None:
        """Called before a state dictionary is loaded: note whether it holds the adapter's factors."""
        pairs = self._pairs() if self._loaded is None else ()
        # To shard a model, Accelerate moves it to the meta device and fills it with its own values.
        if not pairs or pairs[0].parameter("A").is_meta:
            return
        if any(prefix + pair.name_of_A in state for pair in pairs):
            self._loaded = "values"
            self._forward_hook = pairs[0].layer.register_forward_pre_hook(self._values_compute)

    def _values_compute(self, *unused: Any) -> None:
        """Called before a forward pass."""
        self.used()

    def _values_go(self, *unused: Any) -> None:
        """Called before a save."""
        self._before_save()
        if self._loaded == "values" and not self._waits_for_a_step():
            self.used()

    def used(self) -> None:
        """Note that the values are used now, and warn if they are alone."""
        if self._loaded == "values":
            self._warn(
                f"Values were loaded into adapter {self._adapter!r} while its ranks adapt, without the state of the "
                "run that made them. The adapter keeps the scale and the ranks that it has now, so with these values "
                "it may compute something else than that run did. Load its state, too: `ranks.load_state_dict(...)`. "
                "Or load the adapter into a fresh base model."
            )
        self.forget()

    @property
    def are_from_here(self) -> bool:
        """Whether nothing was loaded since the last step."""
        return self._loaded is None

    def state_came(self) -> None:
        """Note that the state of the run was loaded."""
        self.forget()
        self._loaded = "state"

    def forget(self) -> None:
        """Forget what was loaded."""
        self._loaded = None
        if self._forward_hook is not None:
            self._forward_hook.remove()
        self._forward_hook = None

    def end(self, model: nn.Module, narrowed: Sequence[PeftPair]) -> None:
        """From now on, refuse values that have other ranks than the layers, with the reason.

        Args:
            model: the PEFT model with the adapter.
            narrowed: the factors of the layers that still hold the adapter.
        """
        self.stop()
        self._narrowed = narrowed
        self._hooks.append(model.register_load_state_dict_pre_hook(self._earlier_values_come))

    def _earlier_values_come(
        self, model: nn.Module, state: Mapping[str, Any], prefix: str, *unused: Any
    ) -> None:
        """Called before a state dictionary is loaded. PyTorch would refuse it, too, but could not say why."""
        for pair in self._narrowed:
            try:
                own = pair.parameter("A")
            except FactorsGone:
                continue
            came = state.get(prefix + pair.name_of_A)
            if came is not None and came.shape != own.shape:
                raise ValueError(
                    f"These values of adapter {self._adapter!r} have other ranks than its layers, which were narrowed "
                    f"when the run ended: A of {pair.path!r} is {tuple(own.shape)} here and {tuple(came.shape)} there. "
                    "To go back to an earlier point of the run, load the base model, attach the adapter anew, call "
                    "`adapt_ranks`, and load the values together with the state of their run."
                )

    def stop(self) -> None:
        """Forget what was loaded, and notice nothing from now on."""
        self.forget()
        while self._hooks:
            self._hooks.pop().remove()
