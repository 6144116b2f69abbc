"""Warns of training that leaves all adapters out: they are frozen, or the optimizer does not hold them."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from rankwise.attach.attachment import adapter_layers, saved_modules
from rankwise.model.held import HoldsAdapters

_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_seen: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


class TellsOfNoTraining(HoldsAdapters):
    """The part of an adapted model that warns if nothing of it trains."""

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode, as `torch.nn.Module.train` does.

        Args:
            mode: True for training mode, False for evaluation mode.

        Warns:
            UserWarning: no parameter of the model would train, as its adapters are for inference.
        """
        super().train(mode)
        if mode and self.peft_config and not any(p.requires_grad for p in self.parameters()):
            idle = sorted(self._rankwise_to_train - set(self.active_adapters))
            activate = f", or activate {idle[0]!r} with `set_adapter`" if idle else ""
            warnings.warn(
                f"Nothing of this model trains: the active adapters {self.active_adapters} are for inference, so "
                "`backward()` will fail. To continue training one, load it with `PeftModel.from_pretrained(model, "
                f"folder, is_trainable=True)`{activate}.",
                UserWarning,
                stacklevel=2,
            )
        return self


def watch(model: nn.Module) -> None:
    """Warn from now on of optimizers that were made before ``model`` was adapted. They train none of its adapters."""
    _watched.add(model)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _watched:
        return
    seen = _seen.setdefault(optimizer, weakref.WeakSet())
    for model in list(_watched):
        if model not in seen:
            seen.add(model)
            _tell_of(optimizer, model)


def _tell_of(optimizer: Optimizer, model: Any) -> None:
    if getattr(model, "_rankwise_controller", None) is not None or not getattr(model, "peft_config", None):
        return  # a controller checks its own adapter, and a model without adapters needs no check
    layers, copies = adapter_layers(model).values(), saved_modules(model).values()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = [p for layer in layers for name in layer.lora_A for p in layer.adapter_parameters(name).values()]
    own += [p for module in copies for p in module.modules_to_save.parameters()]
    frozen = [p for layer in layers if (p := layer.held_weight()) is not None and not p.requires_grad]
    trains = any(p.requires_grad for p in own)
    if trains and not any(id(p) in held for p in own) and any(id(p) in held for p in frozen):
        warnings.warn(
            "An optimizer holds frozen weights of the adapted layers but none of the adapter's, so it "
            "doesn't train the adapter. Build the optimizer after `get_peft_model`.",
            UserWarning,
            stacklevel=4,
        )


register_optimizer_step_pre_hook(_before_step)
