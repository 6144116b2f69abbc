"""The state that all parts of an adapted model use: which adapters it has, which act, and which allocates ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rankwise.adapters import ParameterSlot
from rankwise.adapters.inplace import remove_methods
from rankwise.adapters.quantized import release_layout
from rankwise.adapters.ready import forget
from rankwise.attach.attachment import adapter_layers, detach_all, saved_modules
from rankwise.config import LoraConfig
from rankwise.run.controller import Controller
from rankwise.run.history import RankHistory

_ATTRIBUTES = (
    "peft_config",
    "_rankwise_controller",
    "_rankwise_histories",
    "_rankwise_to_train",
    "_rankwise_places",
    "_rankwise_vocabulary",
    "_rankwise_checkpointing",
    "_rankwise_input_hooks",
    "_ddp_params_and_buffers_to_ignore",
    "_hf_peft_config_loaded",
)


class HoldsAdapters(nn.Module):
    """The attributes of an adapted model, and properties that read them."""

    peft_config: dict[str, LoraConfig]
    _rankwise_controller: Controller | None
    _rankwise_histories: dict[str, RankHistory]
    _rankwise_to_train: set[str]  # names of the adapters that were attached to be trained

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        layers = adapter_layers(self)
        if layers:
            return list(next(iter(layers.values())).active_adapters)
        return [name for module in saved_modules(self).values() if (name := module.active_adapter)][:1]

    @property
    def active_adapter(self) -> str | list[str] | None:
        """Name of the active adapter. As in PEFT it is a list of names if several are active, and None if none is."""
        names = self.active_adapters
        return names if len(names) > 1 else next(iter(names), None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts: one is active, and adapters are not disabled."""
        return bool(self.active_adapters) and self._adapters_enabled()

    @property
    def active_peft_config(self) -> LoraConfig:
        """Configuration of the adapter that trains, or else of the first active adapter."""
        return self.peft_config[self._trained_or_active()]

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the adapted layers."""
        return [path for path, layer in adapter_layers(self).items() if not isinstance(layer, ParameterSlot)]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the adapted parameters, such as stacks of experts."""
        return [path for path, layer in adapter_layers(self).items() if isinstance(layer, ParameterSlot)]

    def _controller_of(self, adapter_name: str) -> Controller | None:
        controller = self._rankwise_controller
        return controller if controller and controller.adapter == adapter_name else None

    def _controller_or_refuse(self) -> Controller:
        if self._rankwise_controller is None:
            raise ValueError("No AdaLoRA adapter trains on this model: attach one with an AdaLoraConfig.")
        return self._rankwise_controller

    def _drop_controller(self) -> None:
        if self._rankwise_controller is not None:
            self._rankwise_controller.detach()
            self._rankwise_controller = None
            del self._ddp_params_and_buffers_to_ignore

    def _trained_or_active(self) -> str:
        if self._rankwise_controller is not None:
            return self._rankwise_controller.adapter
        name = next(iter(self.active_adapters), None)
        if name is None:
            raise ValueError("The model has no active adapter.")
        return name

    def _checked_names(self, names: list[str] | None) -> list[str]:
        for name in names or ():
            self._check_name(name)
        return names or self.active_adapters

    def _check_name(self, name: str) -> None:
        if name not in self.peft_config:
            raise ValueError(f"There is no adapter {name!r}; the model has {sorted(self.peft_config)}.")

    def _merged(self) -> list[str]:
        return next(
            (layer.merged_adapters for layer in adapter_layers(self).values() if layer.merged_adapters), []
        )

    def _refuse_merged(self) -> None:
        if self._merged():
            raise ValueError(
                "Call `unmerge_adapter` first: what is merged into the base weights would stay there."
            )

    def _adapters_enabled(self) -> bool:
        layers, saved = adapter_layers(self).values(), saved_modules(self).values()
        return all(layer.adapters_enabled for layer in layers) and all(m.adapters_enabled for m in saved)

    def _strip(self, keep_saved: Sequence[str] = ()) -> Any:
        self._drop_controller()
        release_layout(self)
        detach_all(self, keep_saved)
        for handle in self.__dict__.get("_rankwise_input_hooks", ()):
            handle.remove()
        for name in _ATTRIBUTES:
            self.__dict__.pop(name, None)
        inner = self.__dict__.pop("_rankwise_inner", None)
        if inner is not None:
            inner.__dict__.pop("update_and_allocate", None)
        remove_methods(self)
        forget(self)
        return self
