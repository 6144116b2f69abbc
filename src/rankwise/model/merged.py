"""Merging an adapted model's adapters into its base weights, and removing them."""

from __future__ import annotations

import warnings
from typing import Any

from rankwise.attach.attachment import adapter_layers
from rankwise.attach.merging import merge, refuse_sharded, refuse_shared_copies
from rankwise.model.places import KeepsPlaces


class MergesAdapters(KeepsPlaces):
    """The part of an adapted model that changes its base weights."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add updates of adapters to the base weights. `unmerge_adapter` removes them.

        Args:
            adapter_names: names of the adapters to merge. None: the active ones.
            safe_merge: refuse to merge NaN or infinite values.

        Raises:
            ValueError: a weight cannot be merged into, or is shared with another module, which would change too; or
                a merged weight would not be finite and ``safe_merge`` is set. The model is then as before.

        Warns:
            UserWarning: base weights are quantized, so the merged weights are rounded; or the adapters are merged
                already.
        """
        names = self._checked_names(adapter_names)
        if names and set(names) <= set(self._merged()):
            warnings.warn(
                f"The adapters {names} are merged already: nothing changes.", UserWarning, stacklevel=2
            )
            return
        merge(self, names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Remove merged updates from the base weights."""
        for layer in adapter_layers(self).values():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Merge adapters for good, remove all adapters, and return the model with its own class and plain layers.

        Args:
            progressbar: accepted for compatibility with PEFT, without effect.
            safe_merge: refuse to merge NaN or infinite values.
            adapter_names: names of the adapters to merge. None: the active ones.

        Raises:
            ValueError: as `merge_adapter`; or the parameters are sharded over processes.
        """
        refuse_sharded(self, "merge_and_unload")
        names = self._checked_names(adapter_names)
        refuse_shared_copies(self, names)
        merge(self, names, safe_merge, for_good=True)
        return self._strip(keep_saved=names)

    def unload(self) -> Any:
        """Remove all adapters, and return the model, which is its base model again.

        Raises:
            ValueError: the parameters are sharded over processes.
        """
        refuse_sharded(self, "unload")
        self.unmerge_adapter()
        return self._strip()
