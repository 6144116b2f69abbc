"""Reading and changing sharded parameters of ``fully_shard`` (FSDP version 2).

Their parameters and gradients are DTensors, of which each process holds a part. The functions here gather the whole
tensor, compute the same in every process, and change the local part.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.parallel import zero
from rankwise.parallel.processes import callers, running


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def put_back() -> None:
    """Put the sharded parameters of ``fully_shard`` back into their modules.

    A forward pass without a backward pass, such as an evaluation, may leave whole copies in their place. The copies
    have no gradients, no optimizer knows them, and changes of their values are lost.
    """
    fsdp, states = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "_composable_state"))
    if fsdp is not None and states is not None:
        for module in list(getattr(states, "_module_state_mapping", ())):  # of the whole process
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def shared_out(model: nn.Module) -> bool:
    """Whether the model's parameters can be read only by all processes together."""
    put_back()
    return any(is_sharded(parameter) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor, which may be changed in place."""
    return tensor.to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[no-any-return]


def local_like(values: Tensor, like: Any) -> Tensor:
    """The part of ``values`` that corresponds to the local part of ``like``, in its dtype and on its device."""
    values = values.to(device=like.device, dtype=like.dtype)
    return local(_spread(values, like)) if is_sharded(like) else values


def like(values: Tensor, other: Any) -> Tensor:
    """Shard ``values``, which every process has whole, as ``other`` is sharded."""
    return _spread(values, other) if is_sharded(other) else values


def laid_out(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Prepare tensors for loading: each is sharded like the entry of the state dictionary ``own``."""
    return {key: like(tensor, own[key]) for key, tensor in tensors.items()}


def _spread(values: Tensor, like: Any) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    whole = DTensor.from_local(values.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    spread = whole.redistribute(mesh, like.placements)
    return spread if values.device == spread.device else spread.to(values.device)


def gather(tensors: Sequence[Any]) -> list[Tensor]:
    """Return every tensor whole. A tensor that is not sharded is returned as it is.

    All processes must call it together. Tensors that are sharded by rows, as in FSDP version 2, take one exchange
    between the processes for each dtype.
    """
    if not any(is_sharded(tensor) or hasattr(tensor, "ds_id") for tensor in tensors):
        return list(tensors)
    with zero.whole(tensors):
        whole = [t.detach().clone() if hasattr(t, "ds_id") else t for t in tensors]
    together: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if is_sharded(tensor):
            dimension = _sharded_by_rows(tensor)
            if dimension is None:
                whole[place] = tensor.full_tensor()
            else:
                key = (tensor.device_mesh.get_group(dimension), tensor.dtype, tensor.device)
                together.setdefault(key, []).append(place)
    for (group, _, _), places in together.items():
        for place, tensor in zip(places, _gather_rows([tensors[p] for p in places], group), strict=True):
            whole[place] = tensor
    return whole


def squared_norms(
    tensors: Sequence[Any],
    blocks: Sequence[int],
    device: torch.device,
    orders: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The squared norm of every block of columns, (total number of blocks,), float32. It is 0 where a tensor is None.

    All processes must call it together. Tensors that are sharded by rows take one exchange of these norms.

    Args:
        tensors: tensors of shape (rows, columns), or of any shape where there is one block; or None.
        blocks: number of blocks into which each tensor's columns are divided, at least 1.
        device: device of the result.
        orders: for each tensor the order that sorts its columns by block, (columns,), int64. None: they are sorted.
    """
    if _are_plain(tensors) and all(count == 1 for count in blocks):
        return torch.stack(torch._foreach_norm(list(tensors))).to(device, torch.float32).square()
    found: list[Tensor] = [torch.empty(0)] * len(tensors)
    whole = [n for n, tensor in enumerate(tensors) if tensor is not None and blocks[n] == 1]
    if whole:
        norms = torch._foreach_norm([local(tensors[n]) for n in whole])
        squares = torch.stack([norm.to(device, torch.float32) for norm in norms]).square()
        for n, square in zip(whole, squares.split(1), strict=True):
            found[n] = square
    for n, tensor in enumerate(tensors):
        if tensor is None:
            found[n] = torch.zeros(blocks[n], dtype=torch.float32, device=device)
        elif blocks[n] > 1:
            of_columns = local(tensor).float().square().sum(0)
            order = None if orders is None else orders[n]
            of_columns = of_columns if order is None else of_columns[order.to(of_columns.device)]
            found[n] = of_columns.view(blocks[n], -1).sum(1).to(device)
    together: dict[Any, list[int]] = {}
    for n, tensor in enumerate(tensors):
        if is_sharded(tensor):
            for dimension, placement in enumerate(tensor.placements):
                if not placement.is_replicate():
                    together.setdefault(tensor.device_mesh.get_group(dimension), []).append(n)
    for group, places in together.items():
        # Parameters may be offloaded to the CPU, where the group cannot exchange them.
        sums = torch.cat([found[n] for n in places]).to(tensors[places[0]].device_mesh.device_type)
        torch.distributed.all_reduce(sums, group=group)
        for n, part in zip(places, sums.to(device).split([blocks[n] for n in places]), strict=True):
            found[n] = part
    return torch.cat(found)


def _are_plain(tensors: Sequence[Any]) -> bool:
    """Whether all are whole tensors of one dtype on one device, which is the usual case."""
    if not tensors or any(tensor is None or is_sharded(tensor) for tensor in tensors):
        return False
    return len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1


def _sharded_by_rows(tensor: Any) -> int | None:
    """The mesh dimension over which a DTensor's rows are sharded. None if it is sharded in another way."""
    from torch.distributed.tensor import Shard

    others = [number for number, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    by_rows = len(others) == 1 and type(tensor.placements[others[0]]) is Shard
    return others[0] if by_rows and tensor.placements[others[0]].dim == 0 else None


def _gather_rows(tensors: list[Any], group: Any) -> list[Tensor]:
    size = torch.distributed.get_world_size(group)
    # With n = rows / processes, rounded up, process k holds the rows from k * n to (k + 1) * n.
    shares = [-(-tensor.shape[0] // size) for tensor in tensors]
    widths = [tensor.shape[1:].numel() for tensor in tensors]
    rows = [
        [min(max(tensor.shape[0] - k * n, 0), n) for tensor, n in zip(tensors, shares, strict=True)]
        for k in range(size)
    ]
    counts = [[n * width for n, width in zip(own, widths, strict=True)] for own in rows]
    held = torch.cat([local(tensor).detach().reshape(-1) for tensor in tensors])
    longest = max(map(sum, counts))
    device = tensors[0].device_mesh.device_type  # parameters may be offloaded to the CPU
    sent = torch.nn.functional.pad(held, (0, longest - held.numel())).to(device)
    received = sent.new_empty(size * longest)
    torch.distributed.all_gather_into_tensor(received, sent, group=group)
    parts = [
        part[: sum(own)].split(own) for part, own in zip(received.view(size, longest), counts, strict=True)
    ]
    return [
        torch.cat([parts[k][place] for k in range(size)]).view(tensor.shape)
        for place, tensor in enumerate(tensors)
    ]


def only_makes_state() -> bool:
    """Whether the optimizer steps only to create its state, as sharded checkpoints do before loading."""
    checkpoints: Any = sys.modules.get("torch.distributed.checkpoint.state_dict")
    makes_state = getattr(checkpoints, "_init_optim_state", None)
    return makes_state is not None and running(makes_state)


def in_sharded_checkpoint() -> bool:
    """Whether the caller runs inside ``torch.distributed.checkpoint``.

    It loads a tensor only into one of the same size, but text of any length.
    """
    return "torch.distributed.checkpoint" in sys.modules and any(
        frame.f_globals.get("__name__", "").startswith("torch.distributed.checkpoint.") for frame in callers()
    )
