"""Puts the state of the run into the model's own ``state_dict``, so that any trainer's checkpoint holds it.

Scores and masks are buffers of the model. The step and the history are its extra state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.attach.attachment import adapter_layers
from rankwise.model.held import HoldsAdapters
from rankwise.parallel import zero
from rankwise.parallel.sharded import in_sharded_checkpoint, is_sharded, put_back
from rankwise.run.checkpoint import as_text, from_text, load_packed_state, packed_state
from rankwise.run.run_tensors import BUFFERS, was_left_empty
from rankwise.storage.names import EXTRA_STATE


class CarriesRun(HoldsAdapters):
    """The part of an adapted model that puts the run into its state dictionary."""

    def get_extra_state(self) -> Tensor | str:
        """Return step and history of the run for ``state_dict``, as a tensor, which every file format takes.

        With sharded parameters and inside ``torch.distributed.checkpoint`` the result is a string. Sharded checkpoints
        load a tensor only into one of the same size, and a history grows.
        """
        controller = self._rankwise_controller
        state = packed_state(controller) if controller else torch.zeros(0, dtype=torch.int64, device="cpu")
        put_back()
        text = any(map(is_sharded, self.parameters())) or in_sharded_checkpoint()
        return as_text(state) if text else state

    def set_extra_state(self, state: Tensor | str) -> None:
        """Restore the step and the history of the run.

        Args:
            state: result of `get_extra_state`.

        Raises:
            ValueError: ``state`` does not hold the state of a run.
        """
        if isinstance(state, str):
            state = from_text(state)
        if self._rankwise_controller is not None and state.numel():
            load_packed_state(self._rankwise_controller, state)
        for name in self.peft_config:
            for layer in adapter_layers(self, name).values():
                zero.tell_who_uses(layer, layer.adapter_parameters(name).values())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert the model. The scores move along but stay float32, since half precision would spoil them."""
        held = {name: self._buffers[name] for name in BUFFERS if name in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in held.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.is_meta:  # see `_on_meta_device`
                self._buffers[name] = before
            elif before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    # Accelerate's `cpu_ram_efficient_loading` moves a model to the meta device and shards it there. It then fills the
    # model from its state dictionary, which must hold parameters only. So the state of the run stays out of it.

    def _on_meta_device(self) -> bool:
        # All parameters must be on the meta device: Accelerate also offloads parts of a model, which keep their state.
        return all(parameter.is_meta for parameter in self.parameters())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._on_meta_device():
            for name in (*BUFFERS, EXTRA_STATE):
                destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        for name, held in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if held is not None and saved is not None and was_left_empty(name, held, saved):
                state_dict[prefix + name] = torch.zeros_like(held)
        self._warn_of_factors_alone(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *others)
        if self._on_meta_device():
            own = {prefix + name for name in (*BUFFERS, EXTRA_STATE)}
            missing_keys[:] = [key for key in missing_keys if key not in own]

    def _warn_of_factors_alone(self, state_dict: Any, prefix: str) -> None:
        """Warn of factors without the run that made them: their scale and ranks are then unknown."""
        controller = self._rankwise_controller
        if controller is None or not controller.prunes or prefix + EXTRA_STATE in state_dict:
            return
        factor = f".lora_A.{controller.adapter}"
        if (
            any(key.startswith(prefix) and key.endswith(factor) for key in state_dict)
            and not self._on_meta_device()
        ):
            controller.warn(
                f"The state dictionary has the factors of adapter {controller.adapter!r}, but not the state of the run "
                "that made them. The model keeps the scale and the ranks that it has now, so with these factors it may "
                "compute something else than in that run. Save and load the whole `model.state_dict()`, or call "
                "`model.save_pretrained`."
            )
