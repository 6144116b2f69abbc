"""The ranks of an adapted model's AdaLoRA adapter: controlling their allocation, and reading its state."""

from __future__ import annotations

from torch import Tensor

from rankwise.attach.attachment import adapter_layers
from rankwise.config import AdaLoraConfig
from rankwise.model.held import HoldsAdapters
from rankwise.run.history import RankHistory
from rankwise.run.pairs import block_names
from rankwise.run.state import AllocationState
from rankwise.run.summary import LayerRank, RankSummary


class AllocatesRanks(HoldsAdapters):
    """The part of an adapted model that allocates ranks."""

    def update_and_allocate(self, global_step: int) -> None:
        """Cut ranks for one optimizer step if the schedule does, as scripts for PEFT do. This call is not needed.

        Without such calls ranks are cut at optimizer steps. From the first call on, they are cut only by these calls.
        Place them between ``optimizer.step()`` and ``zero_grad()``.

        Args:
            global_step: optimizer step, from 1.

        Raises:
            ValueError: no AdaLoRA adapter trains, or ``total_step`` is not known.
        """
        self._controller_or_refuse().update_and_allocate(global_step)

    def set_total_step(self, total_step: int) -> None:
        """Set the number of optimizer steps of the run, which the schedule needs.

        Args:
            total_step: optimizer steps of the whole run, at least 1.

        Raises:
            ValueError: no AdaLoRA adapter trains, or the schedule's phases do not fit into ``total_step``.
        """
        self._controller_or_refuse().set_total_step(total_step)

    def finalize_ranks(self) -> None:
        """Cut ranks to the final budget now, and keep that choice.

        Call it if a run ends before its schedule does.

        Raises:
            ValueError: no AdaLoRA adapter trains, or it is merged.
        """
        controller = self._controller_or_refuse()
        self._refuse_merged()
        controller.finalize_ranks()

    @property
    def allocation_state(self) -> AllocationState | None:
        """Step, phase and budget of the AdaLoRA adapter that trains. None if no AdaLoRA adapter trains."""
        return self._rankwise_controller.state() if self._rankwise_controller else None

    @property
    def rank_history(self) -> RankHistory | None:
        """The budget and every layer's rank at each cut. A loaded adapter has its folder's history."""
        if self._rankwise_controller:
            return self._rankwise_controller.history
        return self._rankwise_histories.get(next(iter(self.active_adapters), ""))

    def rank_summary(self) -> RankSummary:
        """Return the rank, the importance and the number of parameters of every adapted layer.

        They are those of the adapter that trains. If none trains, they are those of the active adapter.

        ``print`` shows the result as a table. If the parameters are sharded over processes (``fully_shard``, ZeRO-3),
        all processes must call this together.
        """
        name = self._trained_or_active()
        controller = self._controller_of(name)
        layers = adapter_layers(self, name)
        config = self.peft_config[name]
        adalora = isinstance(config, AdaLoraConfig)
        first, last = _ends(self._rankwise_histories.get(name))
        ranks = controller.allocated_ranks() if controller else {} if adalora else last
        scores = iter(controller.layer_importance() if controller else ())
        rows = {}
        for path, layer in layers.items():
            factors, blocks = layer.adapter_parameters(name), layer.blocks(layer)
            held = factors["lora_A"].shape[0] // blocks
            size = sum(p.numel() for p in factors.values()) // blocks
            start = config.init_r if isinstance(config, AdaLoraConfig) else held
            for block, own in zip(block_names(path, blocks), layer.block_ranks(name), strict=True):
                rank = ranks.get(block, own)
                parameters = size * rank // held if held else 0
                row = LayerRank(block, rank, first.get(block, start), next(scores, float("nan")), parameters)
                rows[block] = row
        # A plain LoRA folder has no tensors of layers at rank 0: the history names them, in the model's order.
        rows = {block: LayerRank(block, 0, start, float("nan"), 0) for block, start in first.items()} | rows
        return RankSummary(list(rows.values()), budget=sum(row.init_r for row in rows.values()))

    def orthogonal_penalty(self) -> Tensor:
        """Return the mean of ||A Aᵀ - I||_F and ||Bᵀ B - I||_F over all layers, unweighted, as a 0-dim tensor.

        Raises:
            ValueError: no AdaLoRA adapter trains.
        """
        return self._controller_or_refuse().penalty()


def _ends(history: RankHistory | None) -> tuple[dict[str, int], dict[str, int]]:
    """The ranks of all blocks at the start and at the end of a loaded adapter's history."""
    records = history.records if history is not None else []
    if history is None or not records:
        return {}, {}
    first, last = (dict(zip(history.layers, records[n].ranks, strict=True)) for n in (0, -1))
    return first, last
