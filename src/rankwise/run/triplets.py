"""The triplets of one adapter, wherever they are: factors in the layers, masks and scores in buffers of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters import AdapterLayer
from rankwise.method.layout import TripletLayout
from rankwise.parallel.sharded import gather, local, local_like
from rankwise.parallel.zero import ZeroParts

FACTORS = ("lora_A", "lora_E", "lora_B")  # the order in which `ZeroParts` has those of all layers
AVERAGES = ("rankwise_sensitivity", "rankwise_uncertainty")
BUFFERS = (*AVERAGES, "rankwise_mask", "rankwise_skipped")


def was_left_empty(name: str, own: Tensor, saved: Tensor) -> bool:
    """Whether ``saved`` is the buffer ``name`` of a run that scored nothing, from when those had one or no element."""
    return name in AVERAGES and own.numel() != saved.numel() and saved.numel() <= 1


class Triplets:
    """All triplets of one adapter of one model.

    What must survive a checkpoint lies in buffers of the model, see `BUFFERS`, so that the model's own
    ``state_dict`` carries it through any trainer.

    Args:
        model: the adapted model; it holds this object, and not the other way round, so that it can be freed.
        layers: module path -> adapted layer, in model order.
        adapter: the adapter's name.
    """

    def __init__(self, model: nn.Module, layers: dict[str, AdapterLayer], adapter: str) -> None:
        self._model = weakref.ref(model)
        self.layers, self.adapter = layers, adapter
        factors = [layer.adapter_parameters(adapter) for layer in layers.values()]
        self.layout = TripletLayout(
            ranks=tuple(f["lora_A"].shape[0] for f in factors),
            widths_in=tuple(f["lora_A"].shape[1] for f in factors),
            widths_out=tuple(f["lora_B"].shape[0] for f in factors),
            blocks=tuple(layer.blocks(layer) for layer in layers.values()),
        )
        self._indices: dict[Any, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_indices": {}, "_model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model = weakref.ref(state["_model"])

    @property
    def names(self) -> list[str]:
        """A name for every block: the layer's path, and the block's number in it where there are several."""
        return [
            name for path, layer in self.layers.items() for name in block_names(path, layer.blocks(layer))
        ]

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        model = self._model()
        if model is None:
            raise RuntimeError("The adapted model does not exist any more.")
        return model

    # Buffers.

    def register_buffers(self, entries: int) -> None:
        """Give the model the buffers, with all triplets kept and running averages of ``entries`` zeros."""
        device = self._device()
        values = (
            torch.zeros(entries, device=device),
            torch.zeros(entries, device=device),
            torch.ones(self.layout.triplets, dtype=torch.bool, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )
        for name, value in zip(BUFFERS, values, strict=True):
            self.model.register_buffer(name, value)

    def remove_buffers(self) -> None:
        """Take the buffers off the model."""
        for name in BUFFERS:
            delattr(self.model, name)

    def buffer(self, name: str) -> Tensor:
        """One of `BUFFERS`, without its prefix: as it should be, on the device of the factors."""
        buffer = self.model.get_buffer(f"rankwise_{name}")
        if buffer.is_floating_point() and buffer.dtype != torch.float32:  # model.half() casts buffers too
            buffer.data = buffer.data.float()
        device = self._device()
        if buffer.device != device and device.type != "meta":  # the model was moved without its buffers
            buffer.data = buffer.data.to(device)
        return buffer

    @property
    def mask(self) -> Tensor:
        """Which triplets the last allocation kept, (triplets,), bool."""
        return self.buffer("mask")

    def _device(self) -> torch.device:
        device: torch.device = next(iter(self.layers.values())).lora_A[self.adapter].device
        return device

    # Factors.

    def factors(self, key: str) -> list[nn.Parameter]:
        """All A, all E or all B ("lora_A", "lora_E", "lora_B"), in layer order."""
        return [layer.factor(key, self.adapter) for layer in self.layers.values()]

    def numbers(self, key: str) -> range:
        """The numbers of `factors` of one kind among those of all kinds, as `FACTORS` orders them."""
        first = FACTORS.index(key) * len(self.layers)
        return range(first, first + len(self.layers))

    def close(self, kept: Tensor, parts: ZeroParts | None, louder: Tensor | None = None) -> None:
        """Set E to 0 where ``kept``, (triplets,), bool, is False.

        Args:
            kept: the triplets that stay.
            parts: the adapter's A, E and B as DeepSpeed ZeRO holds them, if it does.
            louder: what the E that stay are multiplied by, (triplets,); None: 1.
        """
        E = self.factors("lora_E")
        by = kept.to(E[0].dtype) if louder is None else (kept * louder).to(E[0].dtype)
        factors = by[:, None].split(self.layout.ranks)
        if parts is not None:
            parts.multiply(self.numbers("lora_E"), factors)
            return
        torch._foreach_mul_(
            [local(one) for one in E], [local_like(by, one) for by, one in zip(factors, E, strict=True)]
        )

    def open_gates(self) -> Tensor:
        """The largest E of each triplet's block, (triplets,), float32: what an open gate is; 0 if none is open."""
        E = gather(self.factors("lora_E"))
        gates = torch.cat([each.detach().flatten().to(self.mask.device, torch.float32) for each in E])
        largest = torch.zeros(len(self.layout.block_ranks), device=gates.device)
        return self.spread(largest.scatter_reduce_(0, self._blocks_on(gates.device), gates, "amax"))

    def fix(self) -> None:
        """From here on the forward pass uses the kept triplets only, and a layer without any is its base."""
        kept = self.mask.cpu().split(self.layout.ranks)
        for layer, mask in zip(self.layers.values(), kept, strict=True):
            rank = int(mask.sum())
            if rank == len(mask):
                layer.kept.pop(self.adapter, None)
            elif layer.blocks(layer) == 1 and mask[:rank].all():
                layer.kept[self.adapter] = rank
            else:
                layer.kept[self.adapter] = mask.nonzero().flatten().to(layer.lora_A[self.adapter].device)

    def unfix(self) -> None:
        """The forward pass uses all triplets."""
        for layer in self.layers.values():
            layer.kept.pop(self.adapter, None)

    def acting(self) -> Tensor:
        """Which triplets the layers use, (triplets,), bool, on the CPU."""
        ones = [torch.ones(rank, dtype=torch.bool) for rank in self.layout.ranks]
        found = [layer.kept_of_stack(self.adapter) for layer in self.layers.values()]
        return torch.cat([one if kept is None else kept for one, kept in zip(ones, found, strict=True)])

    def unreached(self) -> Tensor | None:
        """Triplets, (triplets,), bool, of experts that no token has reached; None if there are no experts.

        Nothing has moved in such a matrix of a stack: all of its triplets add exactly 0. Where that is so of all
        layers, nothing is known of any.
        """
        blocks = self.layout.block_counts
        if all(count == 1 for count in blocks):
            return None
        device = self.mask.device
        E, B = gather(self.factors("lora_E")), gather(self.factors("lora_B"))
        moved = [(e.detach().flatten() != 0) & (b.detach() != 0).any(0) for e, b in zip(E, B, strict=True)]
        adds = torch.cat([each.to(device) for each in moved])
        sizes = torch.tensor(self.layout.block_ranks, device=device)
        several = [count > 1 for count in blocks for _ in range(count)]
        idle = torch.tensor(several, device=device) & (self.ranks(adds) == 0)
        return idle.repeat_interleave(sizes) & adds.any()

    # Ranks.

    def ranks(self, mask: Tensor | None = None) -> Tensor:
        """Rank of every block, (blocks,), int64, by the last allocation or by ``mask``, (triplets,), bool."""
        mask = self.mask if mask is None else mask
        counts = torch.zeros(len(self.layout.block_ranks), dtype=torch.int64, device=mask.device)
        return counts.index_add_(0, self._blocks_on(mask.device), mask.to(torch.int64))

    def average_rank(self) -> Tensor:
        """The average rank by the last allocation, a number: LoRA of that rank has as many parameters."""
        costs = self.layout.costs_on(self.mask.device)
        return (costs * self.mask).sum() / max(1, self.layout.costs_of_one_rank)

    def kept(self, fixed: bool, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Module path -> (r,) bool on the CPU: the triplets that a saved adapter holds.

        In the pruning phase a triplet that has grown back since the last allocation still acts, so it is kept:
        its E is looked up in ``state``, a whole state dictionary of the model, or else in the model.

        Args:
            fixed: nothing grows back any more.
            state: as said.
        """
        mask = self.mask.cpu()
        if not fixed:
            own = state and [state[f"{path}.lora_E.{self.adapter}"] for path in self.layers]
            E = own or gather(self.factors("lora_E"))
            open_ones = torch.cat([each.detach().flatten().to(self.mask.device) for each in E]) != 0
            mask = mask | open_ones.cpu()
        return dict(zip(self.layers, mask.split(self.layout.ranks), strict=True))

    def spread(self, per_block: Tensor) -> Tensor:
        """One value for each block, (blocks,) -> one for each triplet, (triplets,)."""
        return per_block[self._blocks_on(per_block.device)]

    def spread_layers(self, per_layer: list[bool], device: torch.device) -> Tensor:
        """One value for each layer -> one for each triplet, (triplets,), bool."""
        values = [
            value for value, rank in zip(per_layer, self.layout.ranks, strict=True) for _ in range(rank)
        ]
        return torch.tensor(values, device=device)

    def _blocks_on(self, device: torch.device) -> Tensor:
        """The number of each triplet's block, (triplets,), int64."""

        def blocks() -> list[int]:
            return [number for number, rank in enumerate(self.layout.block_ranks) for _ in range(rank)]

        return self.index("blocks", blocks, device)

    def index(self, name: str, values: Callable[[], list[int]], device: torch.device) -> Tensor:
        """Whole numbers on a device, made once."""
        if (name, device) not in self._indices:
            self._indices[name, device] = torch.tensor(values(), device=device)
        return self._indices[name, device]


def block_names(path: str, blocks: int) -> list[str]:
    """What the blocks of the layer at ``path`` are called.

    Example:
        >>> block_names("mlp.experts.up", 2), block_names("q_proj", 1)
        (['mlp.experts.up.0', 'mlp.experts.up.1'], ['q_proj'])
    """
    return [path] if blocks == 1 else [f"{path}.{number}" for number in range(blocks)]
