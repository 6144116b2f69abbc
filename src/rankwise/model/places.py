"""Checks at each training pass of an adapted model.

Adapted modules must stay in place: calls that would replace them are refused, and a replaced module is an error. The
checks also let gradients reach the adapters through gradient checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rankwise.attach.attachment import adapter_layers, saved_modules
from rankwise.attach.embeddings import input_embeddings, output_embeddings
from rankwise.attach.input_gradients import any_reentrant, checkpointing_modules, hook_inputs
from rankwise.attach.matching import within
from rankwise.attach.replaced import check_in_place
from rankwise.attach.targets import find_tied
from rankwise.model.held import HoldsAdapters


class KeepsPlaces(HoldsAdapters):
    """The part of an adapted model that guards its adapted modules against replacement."""

    _rankwise_places: dict[str, nn.Module]
    _rankwise_checkpointing: list[nn.Module]
    _rankwise_input_hooks: list[RemovableHandle]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_replica = "_is_replica" in self.__dict__  # of nn.DataParallel, with modules of its own
        if self.training and not is_replica and not torch.compiler.is_compiling():
            self._check_in_place(in_pass=True)
            self._let_gradients_through_checkpoints()
        return super().__call__(*args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own ``resize_token_embeddings``, unless an adapter is on the embeddings.

        Args:
            new_num_tokens: new number of tokens, at least 1. None, without other arguments: the embeddings stay.
            args: further arguments of the model's own method.
            kwargs: further arguments of the model's own method.

        Raises:
            ValueError: an adapter is on the embeddings, and would be lost. Nothing has changed.
        """
        own: Any = super()
        if new_num_tokens is None and not args and not kwargs:
            return own.get_input_embeddings()
        self._refuse_if_adapted("resize_token_embeddings", "resize")
        before = _rows(self)
        made = own.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if before is not None and before != _rows(self):
            self.__dict__.setdefault("_rankwise_vocabulary", before)
        return made

    def set_input_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own ``set_input_embeddings``, unless an adapter is on the embeddings.

        Args:
            args: arguments of the model's own method.
            kwargs: arguments of the model's own method.

        Raises:
            ValueError: an adapter is on the embeddings, and would be lost. Nothing has changed.
        """
        self._refuse_if_adapted("set_input_embeddings", "replace")
        own: Any = super()
        return own.set_input_embeddings(*args, **kwargs)

    def set_output_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own ``set_output_embeddings``, unless an adapter is on the embeddings.

        Args:
            args: arguments of the model's own method.
            kwargs: arguments of the model's own method.

        Raises:
            ValueError: an adapter is on the embeddings, and would be lost. Nothing has changed.
        """
        self._refuse_if_adapted("set_output_embeddings", "replace")
        own: Any = super()
        return own.set_output_embeddings(*args, **kwargs)

    def _refuse_if_adapted(self, method: str, verb: str) -> None:
        embeddings = [*input_embeddings(self), *output_embeddings(self)]
        paths = [path for path, module in self.named_modules() if any(module is each for each in embeddings)]
        saved = list(saved_modules(self))
        held = [*adapter_layers(self), *saved]
        tied = [other for others in find_tied(self, [p for p in paths if p]).values() for other in others]
        lost = next((each for each in held if each in paths or each in tied), None)
        lost = lost or next((path for path in saved if any(within(each, [path]) for each in paths)), None)
        if lost is not None:
            raise ValueError(
                f"`{method}` would {verb} {lost!r}, and with it the adapter that is on it. {verb.capitalize()} the "
                "embeddings of the base model first, and attach or load the adapter then; `model.unload()` takes the "
                "adapters out."
            )

    def _note_places(self) -> None:
        """Remember the places of the adapted modules. Called after an adapter was attached or removed."""
        before: dict[str, nn.Module] = self.__dict__.get("_rankwise_places", {})
        lost = {
            path: module
            for path, module in before.items()
            if any(map(self.peft_config.__contains__, _names(module)))
        }
        self._rankwise_checkpointing = checkpointing_modules(self)
        self._rankwise_places = {**lost, **adapter_layers(self), **saved_modules(self)}

    def _check_in_place(self, in_pass: bool = False) -> None:
        """Raise an error if an adapted module was replaced.

        Raises:
            ValueError: a module was replaced.
        """
        check_in_place(self, self.__dict__.get("_rankwise_places", {}), in_pass)

    def _let_gradients_through_checkpoints(self) -> None:
        """Make inputs require gradients once re-entrant gradient checkpointing is on, whoever switched it on."""
        modules = self.__dict__.get("_rankwise_checkpointing", ())
        if "_rankwise_input_hooks" not in self.__dict__ and any_reentrant(modules):
            self._rankwise_input_hooks = hook_inputs(self, modules)


def _names(module: nn.Module) -> list[str]:
    """The names of the adapters that an adapted module has."""
    held = getattr(module, "lora_A", None) or getattr(module, "modules_to_save", None) or ()
    return list(held)


def _rows(model: nn.Module) -> int | None:
    weights = [getattr(module, "weight", None) for module in input_embeddings(model)]
    return next((len(weight) for weight in weights if isinstance(weight, torch.Tensor)), None)
