"""An adapted model's adapters by name: adding one, activating one, deleting one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rankwise.adapters.quantized import hold_layout
from rankwise.adapters.ready import forget
from rankwise.attach.attachment import (
    Attachment,
    adapter_layers,
    apply_attachment,
    detach,
    follow,
    plan_attachment,
    refuse_overlap,
    saved_modules,
    train_biases,
)
from rankwise.attach.precision import in_base_dtype
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.model.merged import MergesAdapters
from rankwise.model.options import check_attach_options
from rankwise.parallel.wrappers import refuse_wrapped
from rankwise.run.own import own_controller
from rankwise.run.run_tensors import BUFFERS


class NamesAdapters(MergesAdapters):
    """The part of an adapted model that keeps its adapters by name, and activates them."""

    def add_adapter(
        self,
        adapter_name: str | LoraConfig,
        peft_config: LoraConfig | str = "default",
        **options: Any,
    ) -> None:
        """Add an untrained adapter. `set_adapter` makes it act and train.

        The arguments may come in PEFT's order (name, configuration) or in Transformers' (configuration, name).

        Args:
            adapter_name: name of the new adapter.
            peft_config: configuration of the new adapter.
            options: ``autocast_adapter_dtype`` and others, as for `get_peft_model`.

        Raises:
            TypeError: an option is unknown, or an argument has the wrong type.
            ValueError: the name is taken, the configuration does not fit, or another AdaLoRA adapter trains.
        """
        widens = check_attach_options("add_adapter", options)
        if isinstance(adapter_name, LoraConfig):
            adapter_name, peft_config = peft_config, adapter_name
        if not isinstance(adapter_name, str) or not isinstance(peft_config, LoraConfig):
            raise TypeError("`add_adapter` takes a name and a LoraConfig or AdaLoraConfig.")
        attachment = plan_attachment(self, peft_config, adapter_name)
        self._attach(attachment if widens else in_base_dtype(self, attachment))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several together. An adapter trains unless it is for inference only.

        Args:
            adapter_name: name of an adapter, or a list of names.
            inference_mode: True freezes the active adapters.

        Raises:
            ValueError: an adapter does not exist, or two of them have a copy of the same module.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        for name in names:
            self._check_name(name)
        self._refuse_two_copies(names)
        if self._merged():
            warnings.warn(
                "Changing the acting adapter takes the merged one out of the weights.", stacklevel=2
            )
            self.unmerge_adapter()
        train = [name for name in names if not (inference_mode or self.peft_config[name].inference_mode)]
        for layer in adapter_layers(self).values():
            layer.active_adapters = list(names)
            for name in layer.lora_A:
                for parameter in layer.adapter_parameters(name).values():
                    parameter.requires_grad_(name in train)
        for module in saved_modules(self).values():
            module.active_adapter = next((name for name in names if name in module.modules_to_save), None)
            for name, copy in module.modules_to_save.items():
                copy.requires_grad_(name in train)
        for name, config in self.peft_config.items():
            train_biases(self, config, name, name in train)

    def _refuse_two_copies(self, names: list[str]) -> None:
        for path, module in saved_modules(self).items():
            held = [name for name in names if name in module.modules_to_save]
            if len(held) > 1:
                raise ValueError(
                    f"The adapters {held} can't act together: each has a copy of {path!r} in `modules_to_save`, and "
                    "only one copy can act."
                )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Return a context in which the model computes as its base model."""
        before = self._adapters_enabled()
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if before:
                self.enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Disable all adapters until `enable_adapter_layers` is called."""
        self._enable(False)

    def enable_adapter_layers(self) -> None:
        """Enable the active adapters again."""
        self._enable(True)

    disable_adapters = disable_adapter_layers  # the names in Transformers
    enable_adapters = enable_adapter_layers

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was the only active one, the first of the others becomes active.

        Args:
            adapter_name: name of the adapter.

        Raises:
            ValueError: the adapter does not exist.
        """
        self._check_name(adapter_name)
        if adapter_name in self._merged():
            self.unmerge_adapter()
        was_active = adapter_name in self.active_adapters
        train_biases(self, self.peft_config[adapter_name], adapter_name, False)
        if self._controller_of(adapter_name) is not None:
            self._drop_controller()
        detach(self, adapter_name)
        forget(self)
        del self.peft_config[adapter_name]
        self._note_places()
        self._rankwise_histories.pop(adapter_name, None)
        self._rankwise_to_train.discard(adapter_name)
        if was_active and self.peft_config and not self.active_adapters:
            self.set_adapter(next(iter(self.peft_config)))

    def _enable(self, enabled: bool) -> None:
        if not enabled and self._merged():
            warnings.warn("Disabling a merged adapter takes it out of the base weights.", stacklevel=3)
            self.unmerge_adapter()
        trained = [name for name, config in self.peft_config.items() if config.bias != "none"]
        if not enabled and trained:
            warnings.warn(
                f"The biases that adapter {trained[0]!r} has trained stay: they are the base model's own.",
                stacklevel=3,
            )
        for layer in adapter_layers(self).values():
            layer.adapters_enabled = enabled
        for module in saved_modules(self).values():
            module.adapters_enabled = enabled

    def _attach(self, attachment: Attachment) -> None:
        name, config = attachment.adapter, attachment.config
        adalora = isinstance(config, AdaLoraConfig) and not config.inference_mode
        if adalora and self._rankwise_controller is not None:
            raise ValueError(
                f"The AdaLoRA adapter {self._rankwise_controller.adapter!r} trains already, and only one can. "
                f"Add {name!r} with `inference_mode=True`, or delete the other first."
            )
        if not config.inference_mode:
            refuse_wrapped(self, attachment.layers)
        self._refuse_shared_biases(name, config)
        refuse_overlap(self, attachment)
        self._check_in_place()
        active, enabled = self.active_adapters, self._adapters_enabled()
        with self._as_before_on_failure(attachment):
            apply_attachment(self, attachment)
            self.peft_config[name] = config
            if not config.inference_mode:
                self._rankwise_to_train.add(name)
                _install_integrations(self)
                hold_layout(self)
            if getattr(self, "is_quantized", False):
                self._hf_peft_config_loaded = True  # without it, Trainer refuses to train a quantized model
            if adalora:
                layers = adapter_layers(self, name)
                self._rankwise_controller = own_controller(self, layers, name, config)  # type: ignore[arg-type]
                self._ddp_params_and_buffers_to_ignore = list(BUFFERS)
            if active:
                follow(self, name, active, enabled)
            else:
                self.set_adapter(name)
            self._note_places()

    def _refuse_shared_biases(self, name: str, config: LoraConfig) -> None:
        for other, its_config in self.peft_config.items():
            if config.bias != "none" and its_config.bias != "none":
                raise ValueError(
                    f"{other!r} has bias={its_config.bias!r}, and {name!r} bias={config.bias!r}: both would change "
                    "the base model's own biases. Set `bias` to 'none' for one of them."
                )

    @contextmanager
    def _as_before_on_failure(self, attachment: Attachment) -> Iterator[None]:
        """If the block fails, remove the adapter and restore the model."""
        name = attachment.adapter
        trained = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        active = [(layer, list(layer.active_adapters)) for layer in adapter_layers(self).values()]
        copies = [(module, module.active_adapter) for module in saved_modules(self).values()]
        values = [
            (p, p.detach().clone()) for p in map(self.get_parameter, [*attachment.biases, *attachment.frozen])
        ]
        try:
            yield
        except BaseException:
            if self._controller_of(name) is not None:
                self._drop_controller()
            detach(self, name)
            self.peft_config.pop(name, None)
            self._note_places()
            self._rankwise_histories.pop(name, None)
            self._rankwise_to_train.discard(name)
            for layer, names in active:
                layer.active_adapters = names
            for module, was in copies:
                module.active_adapter = was
            for parameter, value in values:
                parameter.data.copy_(value)
            for parameter, trains in trained:
                parameter.requires_grad_(trains)
            raise


def _install_integrations(model: nn.Module) -> None:
    kinds = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    if "transformers.modeling_utils" in kinds or "transformers.trainer" in sys.modules:
        try:
            from rankwise.integrations.transformers import install
        except ImportError:  # a Transformers installation that lacks what its Trainer needs
            return
        install()
