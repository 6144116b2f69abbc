"""Adapters in many processes: what DistributedDataParallel (DDP) must be told, and reading sharded tensors.

DDP averages a parameter's gradient over the processes when the backward pass has reached it, and waits until all
have been reached. Two cases need help:

- In the final phase a layer at rank 0 is its base layer, so nothing would reach its factors and DDP would wait
  for ever. `take_part` puts them into the graph without computing anything.
- Under re-entrant checkpointing the graph shows no parameters, so DDP with ``find_unused_parameters=True`` takes
  them for unused, and stops when the backward pass reaches them all the same ("marked ready twice"). `note_use`
  tells DDP of them.

Under FSDP2 (``fully_shard``) parameters and gradients are DTensors, of which each process holds a part. What is
done with them is: gather the whole, work on it in every process alike, change the local part.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

from rankwise.parallel import zero


def many_processes() -> bool:
    """Whether this process is one of a group: then gradients may be averaged over it."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _TakePart(torch.autograd.Function):
    """The first input as it is; the others get gradients of zero, which hooks of any tool can work with."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.kinds = [(p.shape, p.dtype, p.device) for p in parameters]
        ctx.set_materialize_grads(False)
        return output.detach()  # and not a view: what follows may work in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        return gradient, *(
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds
        )


def writes_files() -> bool:
    """Whether this is the first process of all, or the only one."""
    return not many_processes() or torch.distributed.get_rank() == 0


@contextmanager
def all_wait_for_this() -> Iterator[None]:
    """All processes enter together, and leave when all have done what is within; if one fails, all do."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, message in enumerate(errors):
        if message is not None:
            raise OSError(f"Process {number} failed: {message}")


def take_part(output: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """``output``, with ``parameters`` in its graph: the backward pass gives them gradients of zero.

    Without a process group, or where no gradients are computed, it is ``output`` itself.
    """
    parameters = list(parameters)
    if not torch.compiler.is_compiling():
        zero.refuse_away(parameters)  # a factor that is not here looks like a layer at rank 0
    if not torch.is_grad_enabled():
        note_use(parameters)
    if not torch.is_grad_enabled() or not many_processes():
        return output
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    taken: Tensor = _TakePart.apply(output, *trained) if trained else output  # type: ignore[no-untyped-call]
    return taken


def note_use(parameters: Iterable[nn.Parameter]) -> None:
    """Tell the DDP whose forward is running that ``parameters`` are used, where its graph won't show it.

    That is so inside a re-entrant checkpoint; anywhere else this does nothing.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not many_processes():
        return
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or not ddp.find_unused_parameters or not _inside_reentrant_checkpoint():
        return
    after = vars(ddp).get("_post_forward")
    if after is None:
        after = functools.partial(_post_forward, ddp, [])
        object.__setattr__(ddp, "_post_forward", after)
    after.args[1].extend(parameter for parameter in parameters if parameter.requires_grad)


def _post_forward(ddp: Any, used: list[nn.Parameter], output: Any) -> Any:
    """DDP's own, and then its search for unused parameters again, from ``used`` as well.

    It stands in for one forward pass only.
    """
    object.__delattr__(ddp, "_post_forward")
    output = ddp._post_forward(output)
    searches = ddp.find_unused_parameters and not ddp.static_graph and ddp.require_backward_grad_sync
    if torch.is_grad_enabled() and searches:
        shows = _TakePart.apply(torch.zeros(()), *used)  # type: ignore[no-untyped-call]
        ddp.reducer.prepare_for_backward([*_tensors(output), shows])
    return output


def _tensors(output: Any) -> Iterable[Tensor]:
    from torch.nn.parallel.distributed import _find_tensors

    tensors: Iterable[Tensor] = _find_tensors(output)
    return tensors


def _inside_reentrant_checkpoint() -> bool:
    return _running(CheckpointFunction.forward)


def only_makes_state() -> bool:
    """Whether the optimizer steps only so that its state exists: sharded checkpoints do that before loading."""
    checkpoints: Any = sys.modules.get("torch.distributed.checkpoint.state_dict")
    makes_state = getattr(checkpoints, "_init_optim_state", None)
    return makes_state is not None and _running(makes_state)


def _running(function: Any) -> bool:
    """Whether this is called from within ``function``, at any depth."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


# Sharded tensors.


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def shared_out(model: nn.Module) -> bool:
    """Whether only all processes together can read the model's parameters."""
    return any(is_sharded(parameter) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor, to be changed in place."""
    return tensor.to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[no-any-return]


def local_like(values: Tensor, like: Any) -> Tensor:
    """The part of ``values`` that corresponds to the local part of ``like``, in its dtype and on its device."""
    values = values.to(device=like.device, dtype=like.dtype)
    return local(_spread(values, like)) if is_sharded(like) else values


def like(values: Tensor, other: Any) -> Tensor:
    """``values``, which every process has, sharded as ``other`` is."""
    return _spread(values, other) if is_sharded(other) else values


def laid_out(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors to load, sharded where those in the state dictionary ``own`` are."""
    return {key: like(tensor, own[key]) for key, tensor in tensors.items()}


def _spread(values: Tensor, like: Any) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    whole = DTensor.from_local(values.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    spread = whole.redistribute(mesh, like.placements)
    return spread if values.device == spread.device else spread.to(values.device)


def gather(tensors: Sequence[Any]) -> list[Tensor]:
    """The whole of every tensor; those that are not sharded as they are.

    All processes must call it together. What is sharded by rows, as FSDP2 does, takes one exchange between the
    processes for all tensors of one dtype.
    """
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


def _sharded_by_rows(tensor: Any) -> int | None:
    """The mesh dimension over which a DTensor's rows are shared out; None if it is laid out another way."""
    from torch.distributed.tensor import Shard

    others = [number for number, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    by_rows = len(others) == 1 and type(tensor.placements[others[0]]) is Shard
    return others[0] if by_rows and tensor.placements[others[0]].dim == 0 else None


def _gather_rows(tensors: list[Any], group: Any) -> list[Tensor]:
    size = torch.distributed.get_world_size(group)
    # Process k has rows k * n to (k + 1) * n of each tensor, n being its rows divided by the processes, rounded up.
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
