"""Merging an adapted model's adapters into its weights, and taking them out."""

from __future__ import annotations

import warnings
from typing import Any

from rankwise.attach.attachment import adapter_layers
from rankwise.attach.merging import merge, refuse_sharded, refuse_shared_copies
from rankwise.model.places import KeepsPlaces


class MergesAdapters(KeepsPlaces):
    """The part of an adapted model that has to do with its base weights."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the active (or named) adapters' updates to the base weights; `unmerge_adapter` takes them out.

        Raises:
            ValueError: a weight is shared with another module, which would change too, or can't be merged into;
                or ``safe_merge`` and a merged weight would not be finite. The model is then as before.

        Warns:
            UserWarning: base weights are quantized, so that what is merged is rounded; or they are merged already.
        """
        names = self._checked_names(adapter_names)
        if names and set(names) <= set(self._merged()):
            warnings.warn(
                f"The adapters {names} are merged already: nothing changes.", UserWarning, stacklevel=2
            )
            return
        merge(self, names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Take merged updates out of the base weights again."""
        for layer in adapter_layers(self).values():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Merge for good: the model gets back its own class and plain layers, and is returned.

        Args:
            progressbar: accepted as in PEFT; merging shows none.
            safe_merge: refuse to merge NaN or infinite values.
            adapter_names: the active ones if None.

        Raises: as `merge_adapter`.
        """
        refuse_sharded(self, "merge_and_unload")
        names = self._checked_names(adapter_names)
        refuse_shared_copies(self, names)
        merge(self, names, safe_merge, for_good=True)
        return self._strip(keep_saved=names)

    def unload(self) -> Any:
        """Remove all adapters: the model is its base model again, and is returned."""
        refuse_sharded(self, "unload")
        self.unmerge_adapter()
        return self._strip()
